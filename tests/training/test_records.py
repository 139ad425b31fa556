"""Rows on disk, whatever a kill left behind."""

from __future__ import annotations

import pytest

from llava_drip.training.records import Records


def test_rows_come_back_as_they_were(tmp_path):
    records = Records(tmp_path / "steps.jsonl")
    assert records.read() == []
    rows = [
        {"step": 1, "loss": 0.1 + 0.2},
        {"step": 2, "loss": 1e-17, "skipped": {"counts": {}, "examples": ["ä\u2028"]}},
    ]
    for row in rows:
        records.add(row)
    assert records.read() == rows and Records(str(tmp_path / "steps.jsonl")).read() == rows


def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path):
    path = tmp_path / "steps.jsonl"
    records = Records(path)
    records.add({"step": 1})
    for torn in (b'{"step": 2, "lo', b'{"step": "\xc3', b'{"step": 2}'):  # even a whole one: nobody knows
        with path.open("ab") as file:
            file.write(torn)
        assert Records(path).read() == [{"step": 1}]
        records.add({"step": 3})
        assert records.read() == [{"step": 1}, {"step": 3}]
        records.cut("step", 1)
    path.write_bytes(b'{"step"')
    records.add({"step": 1})
    assert records.read() == [{"step": 1}]


def test_cut_and_go_on(tmp_path):
    path = tmp_path / "steps.jsonl"
    records = Records(path)
    records.cut("step", 3)
    assert not path.exists()
    for step in range(1, 8):
        records.add({"step": step, "loss": step / 3})
    with path.open("ab") as file:
        file.write(b'{"step": 8')
    records.cut("step", 5)
    assert [row["step"] for row in records.read()] == [1, 2, 3, 4, 5]
    records.add({"step": 6, "loss": 0.5})
    assert records.read()[-1] == {"step": 6, "loss": 0.5} and records.read()[4]["loss"] == 5 / 3
    records.cut("step", 0)
    assert records.read() == [] and [file.name for file in tmp_path.iterdir()] == ["steps.jsonl"]


def test_what_is_no_row_is_named(tmp_path):
    path = tmp_path / "epochs.jsonl"
    path.write_text('{"epoch": 1}\nnonsense\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match=r"epochs.jsonl: line 2: not JSON"):
        Records(path).read()
    path.write_text('{"epoch": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"epochs.jsonl: row 2 has no number 'epoch'"):
        Records(path).cut("epoch", 5)
    assert path.read_text() == '{"epoch": 1}\n{"step": 2}\n'


def test_a_row_that_is_no_json_leaves_the_file_alone(tmp_path):
    records = Records(tmp_path / "steps.jsonl")
    records.add({"step": 1})
    with pytest.raises(TypeError):
        records.add({"step": object()})
    assert records.read() == [{"step": 1}]
