"""Files appear whole or not at all."""

from __future__ import annotations

import pytest

from llava_drip.files import whole, whole_folder, write_whole


def test_a_file_takes_the_place_of_another(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(str(tmp_path / "a.txt"), "zwei ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "zwei ä\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    with pytest.raises(RuntimeError), whole(tmp_path / "a.txt") as partial:
        partial.write_text("half of t")
        assert partial.parent == tmp_path and (tmp_path / "a.txt").read_text() == "one"
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "one" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a.txt", "one")


def test_a_folder_that_appears_whole(tmp_path):
    left = tmp_path / ".a.partial" / "of a killed run"
    left.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as partial:
        assert not list(partial.iterdir()) and not (tmp_path / "a").exists()
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "new" / "a") as partial:
        (partial / "one").touch()
    assert [path.name for path in (tmp_path / "new" / "a").iterdir()] == ["one"]
    with pytest.raises(ValueError, match="new/a: is there already"), whole_folder(tmp_path / "new" / "a"):
        pass
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["a", "one"]
