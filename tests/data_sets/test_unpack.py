from __future__ import annotations

import random
import stat
import zipfile
from types import SimpleNamespace

import pytest
from data_server import zipped

from llava_drip.datasets import unpack as module
from llava_drip.datasets.unpack import is_unpacked, marker_of, unpack

MEMBERS = {"train/1.jpg": b"one" * 1000, "train/deep/2.jpg": b"two" * 1000, "train/3.jpg": b""}


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(MEMBERS))
    return tmp_path / "a.zip"


def test_all_files_come_out(archive, tmp_path):
    assert not is_unpacked(archive)
    assert unpack(archive, tmp_path / "out") == 3
    assert {name: (tmp_path / "out" / name).read_bytes() for name in MEMBERS} == MEMBERS
    assert is_unpacked(archive)
    archive.unlink()
    assert is_unpacked(archive)  # the note outlives the zip
    archive.write_bytes(zipped({"other": b"x"}))
    assert not is_unpacked(archive)  # and does not speak for another


def test_a_half_unpacked_one_is_noticed_and_gone_on_with(archive, tmp_path, monkeypatch):
    written, write = [], module._write

    def interrupted(opened, info, path):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(opened, info, path)

    monkeypatch.setattr(module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out")
    assert not is_unpacked(archive)
    monkeypatch.undo()
    before = written[0].stat().st_mtime_ns
    (tmp_path / "out" / "train" / "deep").mkdir()
    (tmp_path / "out" / "train" / "deep" / "2.jpg").write_bytes(b"tw")  # as a copy by another program would leave it
    unpack(archive, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in MEMBERS} == MEMBERS
    assert written[0].stat().st_mtime_ns == before and is_unpacked(archive)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:/evil"])
def test_nothing_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(zipped({"good": b"x", name: b"x"}))
    with pytest.raises(ValueError, match=r"a\.zip: member .*evil' leads out of its folder; nothing was unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


def test_links_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="member 'link' is a link or a device"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_damaged_zips_are_named(archive, tmp_path):
    data = bytearray(archive.read_bytes())
    at = data.index(b"oneone")
    data[at] ^= 1
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip: not a zip that can be read \(Bad CRC-32 .*; remove it"):
        unpack(archive, tmp_path / "out")
    assert not is_unpacked(archive) and not (tmp_path / "out" / "train" / "1.jpg").exists()
    archive.write_bytes(b"<html>sign in</html>")
    with pytest.raises(ValueError, match="not a zip that can be read"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damage_within_a_compressed_member_is_named(tmp_path, method):
    content = random.Random(0).randbytes(5000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as opened:
        opened.writestr("1.jpg", b"x" * 50_000 + content)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[40:300] = b"\xff" * 260
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip: not a zip that can be read \(.*; remove it"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not is_unpacked(tmp_path / "a.zip") and not (tmp_path / "out" / "1.jpg").exists()


def test_it_must_fit(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(ValueError, match="unpacked it takes 0.0 GB"):
        unpack(archive, tmp_path / "out")
    assert not marker_of(archive).exists()
