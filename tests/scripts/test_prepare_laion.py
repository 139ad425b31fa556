"""Tables of addresses → shards: which rows are chosen, what the check finds, and img2dataset itself where there is one."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv, parquet

from llava_drip.contrastive import subset
from llava_drip.contrastive.shard_check import braces, cause_of, check
from llava_drip.contrastive.subset import Filters, parse_count, select
from llava_drip.training import units

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_laion.py"
KNOWN = [10583115303652875706, 4396312325484418820, 4484846823091124225, 3742885829038201081]


@pytest.fixture
def run(run_script):
    return partial(run_script, SCRIPT)


# which rows


def metadata(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "URL": [f"http://host/{seed}/{i}.jpg" for i in range(rows)],
            "TEXT": [None if i % 50 == 7 else f"caption {i}" for i in range(rows)],
            "WIDTH": pa.array(rng.integers(100, 900, rows), pa.int32()),
            "HEIGHT": pa.array(rng.integers(100, 900, rows), pa.int32()),
            "similarity": pa.array(rng.uniform(0.2, 0.5, rows), pa.float32()),
            "punsafe": [None if i % 40 == 3 else float(value) for i, value in enumerate(rng.uniform(0, 1, rows))],
            "LICENSE": ["?"] * rows,
        }
    )


@pytest.fixture
def tables(tmp_path) -> Path:
    folder = tmp_path / "meta"
    folder.mkdir()
    for i in range(3):
        parquet.write_table(metadata(1000, i), folder / f"part-{i}.parquet", row_group_size=300)
    return folder


def chosen(folder: Path) -> list[str]:
    return [url for part in sorted(folder.glob("*.parquet")) for url in parquet.read_table(part)["url"].to_pylist()]


def test_all_that_pass_the_filters(tables, tmp_path):
    filters = Filters(min_similarity=0.3, min_side=200, max_aspect=2.0, max_unsafe=0.5)
    found = select(str(tables), tmp_path / "urls", None, filters, 0)
    expected = []
    for i in range(3):
        for row in metadata(1000, i).to_pylist():
            short, long = sorted((row["WIDTH"], row["HEIGHT"]))
            unsafe = row["punsafe"]
            if row["TEXT"] and short >= 200 and long <= 2 * short and row["similarity"] >= 0.3 and unsafe is not None:
                expected += [row["URL"]] if unsafe <= 0.5 else []
    assert chosen(tmp_path / "urls") == expected and 100 < len(expected) < 2000
    assert (found["rows"], found["passed"], found["selected"]) == (3000, len(expected), len(expected))
    assert parquet.read_table(tmp_path / "urls" / "part-00000.parquet").column_names[:2] == ["url", "caption"]


def test_a_subset_is_reproducible_nested_and_free_of_file_order(tables, tmp_path):
    def take(name: str, count: int, seed: int = 0, data: Path = tables) -> set[str]:
        found = select(str(data), tmp_path / name, count, Filters(), seed)
        urls = chosen(tmp_path / name)
        assert found["selected"] == len(urls) == len(set(urls))
        assert count - 2 <= len(urls) <= count  # a bucket may hold two
        return set(urls)

    first = take("a", 500)
    other = tmp_path / "renamed"
    other.mkdir()
    for i, file in enumerate(sorted(tables.iterdir(), reverse=True)):
        shutil.copy(file, other / f"{i}.parquet")
    assert take("b", 500, data=other) == first
    assert first < take("c", 1200)
    assert len(first & take("d", 500, seed=1)) < 200  # 500 of 2,940: by chance 85
    hosts = [sum(f"/{i}/" in url for url in first) for i in range(3)]
    assert min(hosts) > 120  # evenly from all files
    assert len(take("e", 2940)) == 2940  # all that have a caption


def test_known_rows_stay_known():
    """The hash is a promise: the same rows on every machine and version."""
    urls = np.array([f"http://host/{i}.jpg" for i in range(4)], dtype=object)
    hashes = subset.pd.util.hash_array(urls, hash_key=f"{subset.seed_of('laion subset', 0):016x}", categorize=False)
    assert [int(value) for value in hashes] == KNOWN


def test_csv_and_other_names(tmp_path):
    table = metadata(20).select(["URL", "TEXT", "similarity"]).rename_columns(["url", "caption", "SIMILARITY"])
    csv.write_csv(table, tmp_path / "table.csv")
    select(str(tmp_path / "table.csv"), tmp_path / "urls", None, Filters(min_similarity=0.0), 0)
    assert len(chosen(tmp_path / "urls")) == 19


def test_csv_columns_that_are_empty_at_first(tmp_path):
    """The reader guesses types from the first megabyte: a value beyond it must not end the program, nor a number lose zeros."""
    rows = 40_000
    table = pa.table(
        {
            "URL": [f"http://host/{i}.jpg" for i in range(rows)],
            "TEXT": [f"{i:07}" for i in range(rows)],
            "LICENSE": ["?" if i == rows - 1 else "" for i in range(rows)],
            "punsafe": ["0.25" if i == rows - 1 else "" for i in range(rows)],
        }
    )
    csv.write_csv(table, tmp_path / "table.csv", csv.WriteOptions(quoting_style="none"))
    assert (tmp_path / "table.csv").stat().st_size > 2**20
    select(str(tmp_path / "table.csv"), tmp_path / "urls", None, Filters(max_unsafe=0.5), 0)
    (row,) = parquet.read_table(tmp_path / "urls" / "part-00000.parquet").to_pylist()
    assert row == {"url": f"http://host/{rows - 1}.jpg", "caption": f"{rows - 1:07}", "unsafe": 0.25}


def test_parts_are_whole_shards(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(subset, "ROWS_OF_PART", 700)
    select(str(tables), tmp_path / "urls", None, Filters(), 0)
    sizes = [parquet.read_metadata(file).num_rows for file in sorted((tmp_path / "urls").glob("*.parquet"))]
    assert sizes == [700, 700, 700, 700, 140]


def test_a_selection_is_kept_and_another_refused(tables, tmp_path):
    first = select(str(tables), tmp_path / "urls", 100, Filters(), 0)
    before = (tmp_path / "urls" / "part-00000.parquet").stat().st_mtime_ns
    assert select(str(tables), tmp_path / "urls", 100, Filters(), 0) == first
    assert (tmp_path / "urls" / "part-00000.parquet").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds a selection with other count, filters"):
        select(str(tables), tmp_path / "urls", 99, Filters(min_side=3), 0)


@pytest.mark.parametrize("text, count", [("26M", 26_000_000), ("2.5m", 2_500_000), ("400k", 400_000), ("7", 7)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "-3", "26 millions", "nan", "infM"])
def test_bad_counts(text):
    with pytest.raises(ValueError, match="is not a number of rows"):
        parse_count(text)


def test_mistakes_of_tables_are_named(tables, tmp_path):
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    parquet.write_table(metadata(3).drop_columns(["TEXT", "punsafe"]), tmp_path / "bare.parquet")
    cases = [
        (tmp_path / "none", Filters(), "none: no .parquet, .csv, .tsv file"),
        (tmp_path / "empty", Filters(), "empty: no .parquet, .csv, .tsv file in this folder"),
        (tmp_path / "junk.parquet", Filters(), "junk.parquet: not a readable table"),
        (tmp_path / "bare.parquet", Filters(), "bare.parquet: no column text or caption or title among URL, WIDTH"),
        (tables, Filters(max_watermark=0.5), "part-0.parquet: no column pwatermark .*--max-watermark needs one"),
        (tables, Filters(min_side=10**6), "of 3,000 rows 0 pass the filters"),
    ]
    for data, filters, message in cases:
        with pytest.raises(ValueError, match=message):
            select(str(data), tmp_path / "urls", 10, filters, 0)
        assert not (tmp_path / "urls").exists() and not (tmp_path / "urls.partial").exists(), message


# the check of shards


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, samples: int, stats: bool = True, **replaced: bytes | None) -> None:
    """As img2dataset writes them. replaced: KEY_ending=content, or None for a member left out."""
    with tarfile.open(path, "w") as archive:
        for i in range(samples):
            key = f"{path.stem}{i:04}"
            fields = {"jpg": jpeg(i), "txt": f"caption {i}".encode(), "json": json.dumps({"key": key}).encode()}
            for ending, data in fields.items():
                data = replaced.get(f"s{i}_{ending}", data)
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    if stats:
        causes = {
            "success": samples,
            "HTTP Error 404: Not Found": 3,
            "<urlopen error timed out>": 1,
            "Image decoding error": 1,
        }
        content = {"count": samples + 5, "successes": samples, "failed_to_download": 4, "failed_to_resize": 1}
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({**content, "status_dict": causes}))
        path.with_suffix(".parquet").write_bytes(b"notes")


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four good shards and four damaged ones."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(8):
        write_shard(folder / f"{i:05}.tar", 6)
    write_shard(folder / "00001.tar", 6, s2_txt=None, s3_txt=b" \n", s4_jpg=b"junk")
    whole = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(whole[:3000])  # within a picture
    with tarfile.open(folder / "00004.tar") as tar:
        end = tar.getmembers()[-4].offset  # between two members: tarfile itself sees nothing wrong
    (folder / "00004.tar").write_bytes((folder / "00004.tar").read_bytes()[:end])
    (folder / "00005_stats.json").unlink()  # img2dataset was killed before it was done
    write_shard(folder / "00007.tar", 2, stats=False)  # closed, and yet fewer samples than were written
    return folder


DAMAGE = {
    "00002.tar": "cannot be read to its end",
    "00004.tar": "has no end",
    "00005.tar": "is unfinished",
    "00007.tar": "holds 2 samples, img2dataset wrote 6",
}


@pytest.mark.parametrize("processes", [1, 2])
def test_check_finds_the_damage(shards, processes):
    summary = check(shards, processes=processes)
    assert list(summary["damaged"]) == list(DAMAGE)
    for name, why in DAMAGE.items():
        assert why in summary["damaged"][name]
    assert json.loads((shards / "sizes.json").read_text()) == {
        "00000.tar": 6,
        "00001.tar": 4,
        "00003.tar": 6,
        "00006.tar": 6,
    }
    assert (summary["shards"], summary["pairs"], summary["incomplete"]) == (4, 22, 2)
    assert (summary["pictures_tried"], summary["pictures_corrupt"]) == (24, 1)
    assert any("00001.tar: 000010002 lacks its caption" in example for example in summary["examples"])
    assert any("00001.tar: 000010004.jpg" in example for example in summary["examples"])
    assert summary["downloads"] == {
        "rows": 77,
        "successes": 42,
        "failed_to_download": 28,
        "failed_to_resize": 7,
        "causes": {"HTTP 404": 21, "timed out": 7, "Image decoding error": 7},
    }
    assert json.loads((shards / "summary.json").read_text()) == summary
    assert not list(shards.glob("*.partial")) and not (shards / "damaged").exists()


def test_training_reads_what_the_check_wrote(shards):
    summary = check(shards, move=True)
    assert sorted(file.name for file in (shards / "damaged").glob("*.tar")) == list(DAMAGE)
    for name in DAMAGE:  # without its record img2dataset makes a shard again
        assert not list(shards.glob(f"{Path(name).stem}*"))
    found = units.expand(f"{shards}/{braces(json.loads((shards / 'sizes.json').read_text()))}")
    assert [units.short_name(unit) for unit in found] == ["00000.tar", "00001.tar", "00003.tar", "00006.tar"]
    assert units.count_samples(found) == summary["pairs"] == 22
    assert units.expand(str(shards)) == found  # not img2dataset's .parquet notes
    again = check(shards)
    assert again["damaged"] == {} and again["pairs"] == 22


def test_shards_of_others(tmp_path):
    """No records, no .json, other names: any image-text shards."""
    write_shard(tmp_path / "train-a.tar", 3, stats=False, s0_json=None, s1_json=None, s2_json=None)
    summary = check(tmp_path, decode=0)
    assert (summary["pairs"], summary["pictures_tried"], summary["downloads"]) == (3, 0, None)
    for decode in (1, 2):
        assert check(tmp_path, decode=decode)["pictures_tried"] == decode


def test_shards_without_use(tmp_path):
    with pytest.raises(ValueError, match="holds no .tar shards"):
        check(tmp_path)
    write_shard(tmp_path / "0.tar", 2, stats=False, s0_jpg=b"junk", s1_jpg=b"junk")
    with pytest.raises(ValueError, match="no shard is whole; 0.tar none of 2 pictures can be decoded; .*00001.jpg"):
        check(tmp_path)
    write_shard(tmp_path / "0.tar", 1, stats=False, s0_txt=None)
    with pytest.raises(ValueError, match="0.tar holds no pair"):
        check(tmp_path)


@pytest.mark.parametrize(
    "names, pattern",
    [
        (["00000", "00001", "00002"], "{00000..00002}.tar"),
        (["00007"], "00007.tar"),
        (["00000", "00001", "00003", "00009", "00010"], "{{00000..00001},00003,{00009..00010}}.tar"),
        (["a", "b"], "{a,b}.tar"),
    ],
)
def test_patterns_name_their_shards(names, pattern, tmp_path):
    assert braces([f"{name}.tar" for name in names]) == pattern
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    found = units.expand(f"{tmp_path}/{pattern}")
    assert [Path(unit).stem for unit in found] == names


def test_causes():
    assert cause_of("HTTP Error 403: Forbidden") == "HTTP 403"
    assert cause_of("<urlopen error [Errno -2] Name or service not known>") == "Name or service not known"
    assert cause_of("The read operation timed out") == "timed out"
    assert cause_of("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired>") == "TLS"


def test_program_checks(shards, run):
    result = run("--check", shards, "--processes", 1)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error == f"prepare_laion.py: error: 4 damaged shards in {shards}; --move-damaged puts them aside"
    assert "21 HTTP 404" in result.stdout and "damaged: 00004.tar has no end" in result.stdout
    result = run("--check", shards, "--processes", 1, "--move-damaged")
    assert result.returncode == 0, result.stderr
    pattern = f"--train-data '{shards}/{{{{00000..00001}},00003,00006}}.tar' --train-num-samples 22"
    assert result.stdout.splitlines()[-1] == f"--dataset-type webdataset {pattern}"


def test_program_names_mistakes(tables, tmp_path, run):
    out = tmp_path / "out"
    for flags, code, message in (
        (["--input", tables], 2, "give --input and --output, or --check"),
        (
            ["--input", tables, "--output", out, "--img2dataset", "no-such"],
            1,
            "no program no-such; pip install img2dataset",
        ),
        (["--input", tables, "--output", out, "--subset", "many"], 1, "'many' is not a number of rows"),
        (["--input", tables, "--output", out, "--quality", 101], 2, "--quality 101: must be 0 .. 100"),
        (["--check", tmp_path / "none"], 1, "none: holds no .tar shards"),
    ):
        result = run(*flags)
        assert result.returncode == code and message in result.stderr and len(result.stderr.splitlines()) == 1, flags
    assert not out.exists()


def test_program_selects_only(tables, tmp_path, run):
    result = run("--input", tables, "--output", tmp_path / "out", "--subset", "1k", "--min-side", 200, "--select-only")
    assert result.returncode == 0, result.stderr
    assert "that pass, of 3,000" in result.stdout
    record = json.loads((tmp_path / "out" / "urls" / "selection.json").read_text())
    assert record["selected"] == len(chosen(tmp_path / "out" / "urls")) and record["filters"]["min_side"] == 200


# img2dataset itself, on a server of this machine


@pytest.fixture
def server():
    """/ok/N.jpg is a picture of 600 x 400, /small/N.jpg one of 90 x 60, /junk/N.jpg is none; the rest is not there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            kind, _, name = self.path.lstrip("/").partition("/")
            number = int(name.partition(".")[0])
            pictures = {"ok": (600, 400), "small": (90, 60)}
            data = jpeg(number, pictures[kind]) if kind in pictures else b"junk" if kind == "junk" else None
            self.send_response(200 if data else 404)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.skipif(
    shutil.which("img2dataset") is None,
    reason="no program img2dataset: its pins exclude ours, so it has an environment of its own, which `.ci/run all` makes",
)
@pytest.mark.slow
def test_the_whole_way(server, tmp_path, run):
    kinds = ["ok", "ok", "small", "gone", "junk"]
    urls = [f"{server}/{kinds[i % 5]}/{i}.jpg" for i in range(50)]
    table = pa.table({"URL": urls, "TEXT": [f"caption {i}" for i in range(50)], "similarity": [0.4] * 50})
    parquet.write_table(table, tmp_path / "meta.parquet")
    out = tmp_path / "out"
    flags = ["--input", tmp_path / "meta.parquet", "--output", out, "--rows-per-shard", 20, "--processes", 2]
    flags += ["--min-similarity", 0.3, "--threads", 4, "--retries", 0]
    result = run(*flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].endswith(f"--train-data '{out}/{{00000..00002}}.tar' --train-num-samples 30")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["pairs"], summary["incomplete"], summary["pictures_corrupt"]) == (30, 0, 0)
    assert summary["downloads"]["causes"] == {"HTTP 404": 10, "Image decoding error": 10}
    sizes = {}
    for unit in units.expand(str(out)):
        for sample in units.read(unit, units.Skips()):
            fields = json.loads(sample["json"])
            image = Image.open(io.BytesIO(units.image_bytes(sample)))
            number = int(fields["url"].rpartition("/")[2].partition(".")[0])
            assert sample["txt"].decode() == fields["caption"] == f"caption {number}"
            sizes.setdefault(kinds[number % 5], set()).add(image.size)
            if kinds[number % 5] == "small":  # neither resized nor encoded again
                assert units.image_bytes(sample) == jpeg(number, (90, 60))
    assert sizes == {"ok": {(384, 256)}, "small": {(90, 60)}}

    # Killed in a shard, another damaged later: the same command makes these two again and leaves the third.
    before = (out / "00001.tar").stat().st_mtime_ns
    (out / "00000_stats.json").unlink()
    (out / "00002.tar").write_bytes((out / "00002.tar").read_bytes()[:5000])
    assert run(*flags).returncode == 0  # makes the first, puts the last aside
    assert (out / "damaged" / "00002.tar").is_file()
    result = run(*flags)
    assert result.returncode == 0 and result.stdout.splitlines()[-1].endswith("--train-num-samples 30")
    assert json.loads((out / "summary.json").read_text())["damaged"] == {}
    assert (out / "00001.tar").stat().st_mtime_ns == before
