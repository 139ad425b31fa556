"""Downloads from a real server that breaks off, changes its files, refuses, and asks to wait."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time

import pytest

from llava_drip.datasets.http import Changed, Unreachable, _alone, check_digest, fetch, part_of

CONTENT = os.urandom(3_000_000)
OTHER = os.urandom(2_500_000)


@pytest.fixture
def get(files, tmp_path):
    files.files["a.zip"] = CONTENT

    def call(**options):
        fetch(files.url("a.zip"), tmp_path / "deep" / "a.zip", backoff=0.01, **options)
        return (tmp_path / "deep" / "a.zip").read_bytes()

    return call


def ranges(files) -> list[str | None]:
    return [wanted for _, wanted, _ in files.asked]


def test_a_file_comes_whole_and_nothing_else_stays(get, tmp_path):
    assert get(size=len(CONTENT)) == CONTENT
    assert os.listdir(tmp_path / "deep") == ["a.zip"]


def test_broken_connections_go_on_where_they_stopped(get, files):
    files.faults["a.zip"] = [("drop", 1_200_000), ("drop", 1_000_000)]
    assert get() == CONTENT
    assert ranges(files) == [None, "bytes=1200000-", "bytes=2200000-"]
    assert all(condition for _, _, condition in files.asked[1:])  # If-Range


def test_a_later_start_goes_on_too(files, tmp_path):
    files.files["a.zip"] = CONTENT
    files.faults["a.zip"] = [("drop", 2_000_000), 404]
    with pytest.raises(Unreachable, match="HTTP 404"):
        fetch(files.url("a.zip"), tmp_path / "a.zip", backoff=0.01)
    assert part_of(tmp_path / "a.zip").stat().st_size == 2_000_000
    fetch(files.url("a.zip"), tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert ranges(files)[-1] == "bytes=2000000-"


@pytest.mark.parametrize("kind", ["if-range", "without if-range", "without etag", "shorter"])
def test_two_versions_of_a_file_are_never_joined(get, files, tmp_path, kind):
    files.faults["a.zip"] = [("drop", 2_000_000), 404]
    files.etags = kind != "without etag"
    with pytest.raises(Unreachable):
        get()
    files.files["a.zip"] = OTHER if kind != "shorter" else OTHER[:1_000_000]
    files.ignore_if_range = kind != "if-range"
    assert get() == files.files["a.zip"]


def test_a_server_without_ranges_or_lengths(get, files):
    files.ranges = files.lengths = False
    files.faults["a.zip"] = [("drop", 1_000_000)]
    assert get(size=len(CONTENT)) == CONTENT
    assert ranges(files) == [None, "bytes=1000000-"]


def test_the_server_may_ask_to_wait(get, files, tmp_path):
    files.faults["a.zip"] = [503, ("wait", 1), 500]
    start = time.monotonic()
    assert get() == CONTENT
    assert 1 <= time.monotonic() - start < 10 and len(files.asked) == 4
    files.faults["a.zip"] = [("wait", 86400)]
    with pytest.raises(Unreachable, match="HTTP 429, to be asked again in 1440 minutes"):
        fetch(files.url("a.zip"), tmp_path / "b.zip")


def test_it_gives_up_and_keeps_what_came(get, files, tmp_path):
    files.faults["a.zip"] = [("drop", 500_000), *([502] * 6)]
    with pytest.raises(Unreachable, match="HTTP 502, 6 times in a row; what came so far is kept"):
        get()
    assert get() == CONTENT and ranges(files)[-1] == "bytes=500000-"


def test_a_server_without_ranges_that_always_breaks_off_ends_it(get, files):
    files.ranges = False
    files.faults["a.zip"] = [("drop", 1_000_000)] * 50
    with pytest.raises(Unreachable, match="6 times in a row"):
        get()
    assert len(files.asked) == 6
    files.faults["a.zip"] = [("drop", size) for size in range(1_100_000, 1_900_000, 100_000)]  # each a little further
    assert get() == CONTENT


def test_refusals_are_not_tried_again(get, files, tmp_path):
    files.faults["a.zip"] = [403]
    with pytest.raises(Unreachable, match="HTTP 403 Forbidden"):
        get()
    assert len(files.asked) == 1
    with pytest.raises(Unreachable, match="ConnectError"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", backoff=0.001)


def test_a_file_of_another_size_is_refused_before_it_comes(get, files, tmp_path):
    with pytest.raises(Changed, match="the server's file has 3,000,000 bytes, 3,000,001 are published"):
        get(size=3_000_001)
    assert part_of(tmp_path / "deep" / "a.zip").stat().st_size == 0


def test_checksums(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    check_digest(tmp_path / "a", "md5", hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(Changed, match=r"md5 .* published is 00; it was put aside as /.*/\.a\.wrong"):
        check_digest(tmp_path / "a", "md5", "00")
    assert not (tmp_path / "a").exists() and (tmp_path / ".a.wrong").exists()


def test_two_programs_do_not_write_to_one_file(get, tmp_path):
    (tmp_path / "deep").mkdir()
    with open(part_of(tmp_path / "deep" / "a.zip"), "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="a.zip: another program is downloading it"):
            get()
    assert get() == CONTENT
    with open(part_of(tmp_path / "b"), "ab") as late:  # opened, and then the other was done
        os.replace(part_of(tmp_path / "b"), tmp_path / "b")
        with pytest.raises(ValueError, match="b: another program is downloading it"), _alone(late, tmp_path / "b"):
            pass
