"""Shards as they are found in the world: what is damaged is counted and named, what is whole is read to its end."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llava_drip.training.skips import BadSample, Skips
from llava_drip.training.units import count_samples, expand, image_bytes, is_local, read, short_name

from .helpers import epoch_of, jpeg, numbers, shard_loader, shards, truncated, write_tar

KEYS = ["a.tar: 0", "a.tar: 1", "a.tar: 2"]
MEMBERS = [(f"{n}.{ending}", content) for n in range(3) for ending, content in (("jpg", jpeg()), ("txt", b"words"))]
MEMBER = 512 + 1024  # a header and a small JPEG's blocks


def keys(unit: str) -> tuple[list[str], Skips]:
    skips = Skips()
    return [sample["__key__"] for sample in read(unit, skips)], skips


def tar(folder: Path, members=MEMBERS, **options) -> str:
    return write_tar(folder / "a.tar", members, **options)


def test_a_sample_is_its_files_by_ending(tmp_path):
    skips = Skips()
    samples = list(read(tar(tmp_path), skips))
    assert samples[1] == {"__key__": "a.tar: 1", "jpg": jpeg(), "txt": b"words"}
    assert [sample["__key__"] for sample in samples] == KEYS and skips.total == 0


@pytest.mark.parametrize(
    "options", [{"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}, {"format": tarfile.USTAR_FORMAT}]
)
def test_formats_of_tar(tmp_path, options):
    if options["format"] == tarfile.PAX_FORMAT:
        options["pax_headers"] = {"comment": "made by a test"}
    assert keys(tar(tmp_path, **options))[0] == KEYS
    long = "x" * 90 + "/" + "y" * 60  # a long name has a header of its own
    assert keys(tar(tmp_path, [(f"{long}.txt", b"1")], **options))[0] == [f"a.tar: {long}"]
    if options["format"] != tarfile.USTAR_FORMAT:
        assert keys(tar(tmp_path, [("größe é.txt", b"1")], **options))[0] == ["a.tar: größe é"]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_shards(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        for name, content in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert keys(str(tmp_path / "a.tar"))[0] == KEYS


def test_folders_links_and_webdatasets_own_files_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("same.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            archive.addfile(info)
        for name in ("__meta__", "__meta__/0.txt", "no-ending", "folder/0.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"words"))
    assert keys(str(tmp_path / "a.tar"))[0] == ["a.tar: folder/0"]


def test_a_name_that_comes_twice_begins_another_sample(tmp_path):
    """LAION's shards have such; the rest of the shard is read."""
    members = [("0.jpg", b"1"), ("0.TXT", b"2"), ("0.jpg", b"3"), ("0.txt", b"4"), *MEMBERS[2:]]
    skips = Skips()
    samples = list(read(tar(tmp_path, members), skips))
    assert [(sample["jpg"], sample["txt"]) for sample in samples[:2]] == [(b"1", b"2"), (b"3", b"4")]
    assert len(samples) == 4 and skips.total == 0


# What is damaged. A header and the content of a member take MEMBER bytes, or 1024 for the words.


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (0, 0),  # empty
        (100, 0),
        (MEMBER + 1024 + 200, 0),  # in the second sample's header: the first may lack files
        (MEMBER + 1024 + 512 + 100, 1),  # in the second picture
        (2 * MEMBER + 1024 + 512 + 2, 1),  # in the second words
        (3 * MEMBER + 2 * 1024 + 300, 2),  # in the header of the last words: a sample without them is not given out
    ],
)
def test_a_truncated_shard_is_counted_once_and_gives_what_is_whole(tmp_path, size, left):
    path = truncated(tar(tmp_path), size)
    found, skips = keys(path)
    assert found == KEYS[:left]
    assert skips.counts == {"unreadable shard": 1} and skips.examples[0].startswith(f"{path}: ")
    if left:
        assert f"after {left} samples" in skips.examples[0]


def test_every_truncation_is_noticed_but_between_members(tmp_path):
    """tarfile itself takes a header that is cut off for the end."""
    whole = Path(tar(tmp_path)).read_bytes()
    last = 3 * (MEMBER + 1024)  # what follows is only the mark of the end
    borders = {n * (MEMBER + 1024) + part for n in range(3) for part in (0, MEMBER)} - {0}
    for size in range(0, last, 64):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        found, skips = keys(str(tmp_path / "a.tar"))
        assert skips.total == (0 if size in borders else 1), size
        assert len(found) <= size // (MEMBER + 1024) + 1


def test_damage_in_the_middle(tmp_path):
    path = Path(tar(tmp_path))
    content = bytearray(path.read_bytes())
    content[MEMBER + 1024 : MEMBER + 1024 + 512] = b"\xff" * 512
    path.write_bytes(content)
    found, skips = keys(str(path))
    assert len(found) <= 1 and skips.counts == {"unreadable shard": 1}


def test_what_is_no_tar(tmp_path):
    for content in (b"garbage" * 1000, b"<html>404</html>", jpeg()):
        (tmp_path / "a.tar").write_bytes(content)
        assert keys(str(tmp_path / "a.tar"))[1].counts == {"unreadable shard": 1}


def test_a_shard_that_disappears_before_it_is_read(tmp_path):
    path = tar(tmp_path)
    (unit,) = expand(path)
    Path(path).unlink()
    found, skips = keys(unit)
    assert not found and skips.counts == {"unreadable shard": 1}
    assert path in skips.examples[0] and "No such file" in skips.examples[0]


# Parquet


def parquet(folder: Path, rows: int = 100, group: int = 30, name: str = "a.parquet", **columns) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = columns or {
        "image": [{"bytes": jpeg(), "path": None} for _ in range(rows)],
        "label": list(range(rows)),
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name, row_group_size=group)
    return str(folder / name)


def test_parquet_is_read_by_row_groups(tmp_path):
    path = parquet(tmp_path, group=70)
    units = expand(path)
    assert units == [f"{path}#0", f"{path}#1"] and not any("#" in unit for unit in map(short_name, [path]))
    samples = [list(read(unit, Skips())) for unit in units]
    assert [len(group) for group in samples] == [70, 30]
    assert samples[0][69]["label"] == 69 and samples[1][0]["label"] == 70
    assert samples[1][5]["__key__"] == "a.parquet#1: row 5" and image_bytes(samples[1][5]) == jpeg()
    assert count_samples(units) == 100 and count_samples(units[1:]) == 30
    loader = shard_loader(units, 10, 10, decode=lambda sample: sample["label"])
    assert sorted(int(n) for batch in loader for n in batch) == list(range(100))


def test_a_damaged_parquet_file(tmp_path):
    path = parquet(tmp_path)
    units = expand(path)
    whole = Path(path).read_bytes()
    with pytest.raises(ValueError, match="a.parquet: not a readable parquet file"):
        expand(truncated(path, len(whole) // 2))
    found, skips = keys(units[1])
    assert not found and skips.counts == {"unreadable shard": 1} and path in skips.examples[0]
    content = bytearray(whole)
    content[1000 : len(whole) // 2] = b"\xff" * (len(whole) // 2 - 1000)
    Path(path).write_bytes(content)  # its directory, at the end, is whole
    counts = [keys(unit)[1].counts for unit in units]
    assert {"unreadable shard": 1} in counts and all(set(count) <= {"unreadable shard"} for count in counts)
    Path(path).unlink()
    assert keys(units[0])[1].counts == {"unreadable shard": 1}


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [None], "label": [1]},
        {"image": [{"bytes": None, "path": "x.jpg"}], "label": [1]},
        {"jpg": [None], "label": [1]},
        {"label": [1]},
    ],
)
def test_a_row_without_a_picture(tmp_path, columns):
    (sample,) = read(expand(parquet(tmp_path, **columns))[0], Skips())
    with pytest.raises(BadSample, match="a.parquet#0: row 0: no picture among") as caught:
        image_bytes(sample)
    assert caught.value.cause == "missing picture"


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_pictures_by_ending(tmp_path, ending):
    (sample,) = read(tar(tmp_path, [(f"0.{ending}", b"picture"), ("0.cls", b"1")]), Skips())
    assert image_bytes(sample) == b"picture"


def test_an_empty_parquet_file_is_no_data(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        expand(parquet(tmp_path, image=[], label=[]))


# Names


def test_expand(tmp_path, monkeypatch):
    paths = shards(tmp_path / "data", [1] * 3)
    folder = str(tmp_path / "data")
    assert expand(f"{folder}/{{000..002}}.tar") == paths == expand(folder)
    assert expand(f"{folder}/000.tar::{folder}/{{001..002}}.tar") == paths
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/data") == paths and expand("~/data/000.tar") == paths[:1]
    many = "::".join(paths * 100)
    assert len(many) > 5000 and expand(many) == paths * 100
    remote = "https://host/a-{0..1}.tar"
    assert expand(remote) == ["https://host/a-0.tar", "https://host/a-1.tar"] and not is_local(remote)
    assert expand("pipe:cat x.tar") == ["pipe:cat x.tar"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "no shards: an empty name"),
        ("nothing.tar", "no shard nothing.tar"),
        ("nothing-{0..2}.tar", "no shard nothing-0.tar"),
        ("nothing.parquet", "no shard nothing.parquet"),
        ("{folder}/empty", "holds neither .tar nor .parquet"),
        ("{folder}/x.tar::", "no shard .*x.tar"),  # a folder of that name
        ("{folder}/a-{0..2.tar", "a-{0..2.tar: Unbalanced braces|no shard"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(ValueError, match=message):
        expand(data.replace("{folder}", str(tmp_path)))


def test_a_short_name_tells_nothing_of_where_it_lies():
    assert short_name("/data/a.tar") == short_name("a.tar") == short_name("https://host/x/a.tar?signature=secret")
    assert short_name("/data/a.parquet#3") == "a.parquet#3"


def test_count_samples(tmp_path):
    first, second = shards(tmp_path / "one", [3, 4]), shards(tmp_path / "two", [5])
    assert count_samples(first) is None and count_samples(["https://host/a.tar"]) is None
    (tmp_path / "one" / "sizes.json").write_text('{"000.tar": 3, "001.tar": "4"}')
    assert count_samples(first) == 7 and count_samples(first[:1]) == 3
    assert count_samples(first + second) is None
    (tmp_path / "two" / "__len__").write_text("5\n")
    assert count_samples(first + second) == 12 == count_samples([*first, *second])
    assert count_samples([*first, *expand(parquet(tmp_path / "three", rows=10))]) == 17
    assert count_samples([*first, "https://host/a.tar"]) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sizes.json", "{}", "has no entry for shard '000.tar'"),
        ("sizes.json", "{", "sizes.json: not readable"),
        ("sizes.json", "[1]", "sizes.json: not readable"),
        ("sizes.json", '{"000.tar": null}', "sizes.json: not readable"),
        ("__len__", "many", "__len__: not readable"),
        ("__len__", "[1]", "__len__: not readable"),
    ],
)
def test_damaged_counts(tmp_path, name, content, message):
    units = shards(tmp_path, [3])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        count_samples(units)


# Behind addresses


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/cut-"):  # a connection that breaks off
            content = Path(self.directory, self.path[5:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: MEMBER + 1024 + 512])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads addresses through the program curl, which is not here; .ci/run installs it")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_need_curl(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="http://host/0.tar: .* curl, which is not installed"):
        expand("http://host/0.tar?token=secret")


def test_shards_behind_http(tmp_path, server):
    shards(tmp_path, [6, 6])
    units = expand(f"{server}/{{000..001}}.tar?token=secret")
    loader = shard_loader(units, 4, 3, workers=1)
    assert sorted(numbers(epoch_of(loader))) == list(range(12)) and loader.skips.total == 0


def test_what_goes_wrong_over_http_is_counted_and_named(tmp_path, server):
    tar(tmp_path)
    found, skips = keys(f"{server}/nowhere.tar?token=secret")
    assert not found and skips.counts == {"unreadable shard": 1}
    assert skips.examples == [f"{server}/nowhere.tar: the command that reads it ended with exit code 22"]
    found, skips = keys(f"{server}/cut-a.tar")
    assert found in ([], ["cut-a.tar: 0"]) and skips.counts == {"unreadable shard": 1}


def test_shards_from_a_command(tmp_path):
    path = tar(tmp_path)
    assert keys(f"pipe:cat {path}")[0] == [f"a.tar: {n}" for n in range(3)]
    assert keys(f"pipe:cat {path}")[1].total == 0
    with open(path, "ab") as file:
        file.write(bytes(2**20))  # padding, more than a pipe holds: the command must not die of it
    assert keys(f"pipe:exec cat {path}")[1].total == 0
    # All of it may have come, but the command says that it did not.
    assert keys(f"pipe:cat {path}; exit 3")[1].counts == {"unreadable shard": 1}
    assert keys("pipe:exit 3")[1].counts == {"unreadable shard": 1}


def test_big_shards_can_be_left_in_the_middle(tmp_path):
    """Nothing waits for a command whose shard is not read to its end."""
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"x" * 100_000) for n in range(20)])
    skips = Skips()
    samples = read(f"pipe:cat {path}", skips)
    assert len(next(samples)["txt"]) == 100_000
    samples.close()
    assert skips.total == 0


def test_json_fields_are_bytes(tmp_path):
    (sample,) = read(tar(tmp_path, [("0.json", json.dumps({"a": 1}).encode())]), Skips())
    assert json.loads(sample["json"]) == {"a": 1}
