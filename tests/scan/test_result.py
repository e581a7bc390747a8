"""The forms of a result: the JSON document, CSV, Markdown, the table, the files written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthofast.errors import InputError, MissingPackageError
from orthofast.scan import ScanResult, report, scan_checkpoint
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
    assert widths <= {8, 10, 3}
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
