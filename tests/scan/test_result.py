"""The forms of a result: the JSON document, CSV, Markdown, the table, the files written."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthofast.errors import InputError, MissingPackageError
from orthofast.scan import ScanResult, report, scan_checkpoint
from orthofast.scan.result import FIELDS, form_of
from tests.scan.checkpoints import FAMILIES, make_tensors, write

ROW = {"name", "layer", "role", "vectors", "n", "d", "pii", "baseline", "ratio", "zero", "nonfinite", "error"}
EXTENDED = {"head", "expert", "adapter", "standard_error", "max_abs", "max_pair", "histogram"}
EXTENDED |= {"drift", "relative_change", "tied"}
HOSTILE = "x</script><script>alert(1)</script>\"'|`*\x1b[31m\n{{7*7}}.weight"


@pytest.fixture
def result(tmp_path: Path) -> ScanResult:
    family = FAMILIES["t5 v1.1"]
    broken = {
        "bad.weight": torch.full((3, 4), float("nan")),
        "one.weight": torch.ones(1, 4),
        HOSTILE: torch.randn(4, 3),
    }
    return scan_checkpoint(write(tmp_path / "model", make_tensors(family) | broken, family.config))


def test_the_json_document_has_exactly_its_fields(result: ScanResult) -> None:
    document = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert set(document) == {"schema_version", "rows", "skipped", "provenance"}
    assert document["schema_version"] == 1
    assert all(set(row) == ROW | EXTENDED for row in document["rows"])
    assert all(set(entry) == {"name", "reason"} for entry in document["skipped"])
    bad = [row for row in document["rows"] if row["name"] == "bad.weight"]
    assert [(row["pii"], row["ratio"], row["nonfinite"]) for row in bad] == [(None, None, 3), (None, None, 4)]
    assert all("NaN or Inf" in row["error"] for row in bad)
    for row in document["rows"]:
        assert row["vectors"] in ("rows", "cols")
        assert isinstance(row["n"], int)
        assert row["error"] is not None or row["pii"] is None or 0 <= row["pii"] <= 1


def test_provenance_says_where_the_numbers_come_from(result: ScanResult) -> None:
    known = json.loads(result.to_json())["provenance"]
    assert set(known["versions"]) == {"orthofast", "torch", "numpy", "python"}
    assert known["versions"]["torch"] == torch.__version__
    assert known["files"][0]["name"] == "model.safetensors"
    assert known["files"][0]["nbytes"] > 1000
    assert len(known["config"]["sha256"]) == 64
    assert known["config"]["model_type"] == "t5"
    assert known["precision"] == "auto"
    assert set(known["timings"]) == {"read_s", "fold_s", "wait_s", "total_s"}
    assert known["backends"]
    assert known["date"].endswith("+00:00")
    assert {"platform", "cpu"} <= set(known)


def test_csv_has_one_line_per_row_and_empty_fields_for_what_is_missing(result: ScanResult) -> None:
    lines = list(csv.DictReader(io.StringIO(result.to_csv(), newline="")))
    assert len(lines) == len(result.rows)
    for line, row in zip(lines, result.rows, strict=True):
        assert line["name"] == row.name
        assert line["pii"] == ("" if row.pii is None else repr(row.pii))
    assert "nan" not in result.to_csv().replace("NaN or Inf", "")


def test_markdown_survives_foreign_names(result: ScanResult) -> None:
    text = result.to_markdown()
    assert "<script>" not in text
    assert "\x1b" not in text
    widths = {
        line.replace("\\|", "").count("|")
        for line in text.splitlines()
        if line.startswith("| encoder") or "---" in line
    }
    assert widths <= {8, 10, 4}
    hostile = [line for line in text.splitlines() if "alert" in line]
    assert [line.replace("\\|", "").count("|") for line in hostile] == [10, 10]


def test_the_table_holds_mean_min_max_and_baseline(result: ScanResult) -> None:
    table = result.table5("rows")
    assert table.layers == ("encoder.0", "decoder.0", "decoder.0.cross")
    assert table.columns == ("Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight")
    assert ("decoder.0.cross", "Linear_1.weight") not in table.cells
    values = [table.cells[layer, "Query"] for layer in table.layers]
    footer = table.footer["Query"]
    assert (footer.min, footer.max, footer.count) == (min(values), max(values), 3)
    assert footer.mean == pytest.approx(sum(values) / 3)
    baselines = {row.baseline for row in result.rows if row.role == "Query" and row.vectors == "rows"}
    assert baselines == {footer.baseline}
    assert result.summary()["rows", "Query"].mean == pytest.approx(footer.mean)
    with pytest.raises(InputError, match="side needs"):
        result.table5("heads")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".md", ".html", ".JSON"])
def test_the_suffix_chooses_the_form_and_no_half_file_is_left(suffix: str, result: ScanResult, tmp_path: Path) -> None:
    target = tmp_path / f"result{suffix}"
    target.write_text("old")
    result.write(target)
    text = target.read_text("utf-8")
    expected = {".json": result.to_json, ".csv": result.to_csv, ".md": result.to_markdown, ".html": result.to_html}
    assert text == expected[suffix.lower()]()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", target.name]


def test_an_unknown_suffix_or_folder_is_refused(result: ScanResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.json, \.csv, \.parquet, \.md, \.html, \.png, \.svg"):
        result.write(tmp_path / "result.xlsx")
    with pytest.raises(InputError, match="cannot be written"):
        result.write(tmp_path / "absent" / "result.json")


def test_the_page_escapes_foreign_names_and_asks_no_network(result: ScanResult) -> None:
    page = result.to_html()
    assert "<script>alert" not in page
    assert "default-src 'none'" in page
    assert page.count("</script>") == page.count("<script") == 4
    assert "49.weight" not in page
    assert len(page) < 2_000_000


def test_without_the_extra_the_page_is_refused_with_the_command(
    result: ScanResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("altair", "no_such_package"))
    with pytest.raises(
        MissingPackageError, match=r"no_such_package; install the extra with pip install 'orthofast\[report\]'"
    ):
        result.to_html()


def test_a_page_without_layers_or_rows_is_still_a_page(tmp_path: Path) -> None:
    save_file({"wte.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    assert "wte.weight" in scan_checkpoint(tmp_path).to_html()
    assert "Nothing was skipped" in ScanResult([], [], {}).to_html()


FIRST = """{
"schema_version": 1,
"rows": [
 {"name": "w", "layer": "0", "role": "Query", "vectors": "rows", "n": 4, "d": 3,
  "pii": 0.25, "baseline": 0.5, "ratio": 0.5, "zero": 0, "nonfinite": 0, "error": null}
],
"skipped": [{"name": "b", "reason": "bias"}],
"provenance": {"checkpoint": "old"}
}"""


def test_a_document_reads_back_as_it_was_written(result: ScanResult, tmp_path: Path) -> None:
    result.rows[0].head, result.rows[0].tied = 3, ("twin",)
    result.rows[0].max_abs, result.rows[0].max_pair, result.rows[0].histogram = 0.5, (1, 2), (0, 3, 1)
    result.write(tmp_path / "result.json")
    found = ScanResult.load(tmp_path / "result.json")
    assert found.rows == result.rows
    assert found.skipped == result.skipped
    assert found.to_json() == result.to_json()
    lines = result.to_json().splitlines()
    assert sum(line.startswith('  {"name"') for line in lines) == len(result.rows) + len(result.skipped)


def test_a_document_of_the_first_scan_is_still_valid() -> None:
    found = ScanResult.from_json(FIRST)
    (row,) = found.rows
    assert (row.name, row.pii, row.head, row.tied, row.histogram) == ("w", 0.25, None, (), None)
    assert found.table5("rows").cells == {("0", "Query"): 0.25}
    assert "old" in found.to_html()
    later = FIRST.replace('"error": null', '"error": null, "colour": "red"')
    assert ScanResult.from_json(later).rows == found.rows


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("{", "", "is no JSON"),
        ('"schema_version": 1', '"schema_version": 2', "has schema_version 2, this orthofast reads 1"),
        ('"schema_version": 1,', "", "is no result of a scan"),
        ('"rows": [', '"lines": [', "is no result of a scan"),
        ('"vectors": "rows"', '"vectors": "heads"', "vectors in row 0 of the text needs 'rows' or 'cols'"),
        ('"pii": 0.25', '"pii": "0.25"', "pii in row 0 of the text needs a number or null, got '0.25'"),
        ('"n": 4', '"n": 4.5', "n in row 0 of the text needs an integer"),
        ('"n": 4', '"n": true', "n in row 0 of the text needs an integer"),
        ('"d": 3,', "", "row 0 of the text has no d"),
        ('"error": null', '"error": null, "max_pair": [1]', "max_pair in row 0 of the text needs two integers"),
        ('"error": null', '"error": null, "histogram": ["a"]', "histogram in row 0 of the text needs a list"),
        ('"error": null', '"error": null, "tied": null', "tied in row 0 of the text needs a list of strings"),
        ('{"name": "b", "reason": "bias"}', '{"name": "b"}', "skipped tensor 0 of the text needs a name"),
        ('{"name": "b", "reason": "bias"}', "7", "skipped tensor 0 of the text needs a name"),
        ('{"checkpoint": "old"}', "[]", "provenance an object"),
    ],
)
def test_a_document_with_a_wrong_field_is_refused_by_name(old: str, new: str, word: str) -> None:
    text = FIRST.replace(old, new, 1)
    assert text != FIRST
    with pytest.raises(InputError, match=re.escape(word)):
        ScanResult.from_json(text)


def test_a_file_that_is_no_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "raw.json").write_bytes(b"\xff\xfe\x00")
    for name, word in (
        ("absent.json", "cannot be read"),
        ("deep.json", "is no JSON"),
        ("raw.json", "no text in UTF-8"),
    ):
        with pytest.raises(InputError, match=word):
            ScanResult.load(tmp_path / name)


def test_a_data_frame_and_a_parquet_file_hold_every_field(result: ScanResult, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    result.rows[0].histogram, result.rows[0].max_pair, result.rows[1].tied = (1, 0, 2), (0, 1), ("a", "b")
    frame = result.to_pandas()
    assert list(frame.columns) == list(FIELDS)
    assert (len(frame), str(frame["n"].dtype), str(frame["pii"].dtype)) == (len(result.rows), "Int64", "float64")
    assert frame["head"].isna().all()
    assert frame["pii"].dropna().tolist() == [row.pii for row in result.rows if row.pii is not None]
    result.write(tmp_path / "result.parquet")
    stored = parquet.read_table(tmp_path / "result.parquet")
    assert stored.column_names == list(FIELDS)
    for line, row in zip(stored.to_pylist(), result.rows, strict=True):
        for field in FIELDS:
            value = getattr(row, field)
            assert line[field] == (list(value) if isinstance(value, tuple) else value)
    assert pandas.read_parquet(tmp_path / "result.parquet").shape == frame.shape
    assert parquet.read_table(io.BytesIO(ScanResult([], [], {}).to_parquet())).column_names == list(FIELDS)


@pytest.mark.parametrize("suffix", [".parquet", ".png", ".html"])
def test_a_form_without_its_package_is_refused_before_the_work(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install"):
        form_of(Path(f"x{suffix}"))
