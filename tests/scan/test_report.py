"""Reports of large models: size, what is gathered, what is left out; charts as pictures."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from orthofast.errors import InputError
from orthofast.scan import Row, ScanResult, Skipped, charts, page_data
from orthofast.scan.tables import condensed
from tests.scan import synthetic

LARGEST = 2_000_000


@pytest.fixture(scope="module")
def llama() -> ScanResult:
    return synthetic.dense()


@pytest.fixture(scope="module")
def small() -> ScanResult:
    return synthetic.dense(layers=3)


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.search(r'id="datasets">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    return found


def unpacked(columns: dict[str, Any]) -> list[dict[str, Any]]:
    plain = {
        key: kept if isinstance(kept, list) else [kept["words"][place] for place in kept["at"]]
        for key, kept in columns.items()
    }
    return [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]


def test_the_page_of_a_70b_model_with_its_heads_stays_below_two_megabytes(llama: ScanResult) -> None:
    page = llama.to_html()
    assert len(page.encode()) < LARGEST
    data = data_of(page)
    assert len(unpacked(data["cells-rows"])) == 80 * 7
    assert len(unpacked(data["heads-rows"])) == 80 * (64 + 8 + 8 + 64)
    assert len(page_data.lines(llama.rows)[0]) == 80 * 7 * 2


def test_ninety_thousand_rows_of_experts_are_a_line_per_layer_and_role() -> None:
    result = synthetic.experts(layers=60)
    assert len(result.rows) > 92_000
    page = result.to_html()
    assert len(page.encode()) < LARGEST
    lines, left_out = page_data.lines(result.rows)
    assert (len(lines), left_out) == (60 * 3 * 2, 0)
    line = lines[0]
    members = [
        row
        for row in result.rows
        if (row.layer, row.role, row.vectors) == (line.row.layer, line.row.role, line.row.vectors)
    ]
    values = [row.pii for row in members if row.pii is not None]
    assert line.row.name == "model.layers.0.mlp.experts.*.gate_proj.weight"
    assert (line.count, line.low, line.high) == (256, min(values), max(values))
    assert line.row.pii == pytest.approx(sum(values) / 256)
    assert "model.layers.*.mlp.experts.*.down_proj.weight_scale_inv" in page
    assert "experts.255." not in page


@pytest.mark.parametrize(
    ("name", "expert", "pattern"),
    [
        ("model.layers.3.mlp.experts.3.up_proj.weight", 3, "model.layers.3.mlp.experts.*.up_proj.weight"),
        (
            "model.layers.1.block_sparse_moe.experts.1.w1.weight",
            1,
            "model.layers.1.block_sparse_moe.experts.*.w1.weight",
        ),
        ("h.0.experts.gate_up[12][gate]", 12, "h.0.experts.gate_up[*][gate]"),
        ("h.0.experts.down", 7, "h.0.experts.down"),
    ],
)
def test_a_star_stands_for_the_expert_and_not_for_the_layer(name: str, expert: int, pattern: str) -> None:
    assert page_data.expert_pattern(name, expert) == pattern


def test_heads_experts_and_adapters_leave_the_tables_as_they_are(small: ScanResult) -> None:
    whole = ScanResult([row for row in small.rows if row.head is None], [], {})
    assert small.table5("rows") == whole.table5("rows")
    assert small.summary() == whole.summary()
    assert small.to_markdown() == ScanResult(whole.rows, small.skipped, {}).to_markdown()
    adapted = synthetic.adapted(layers=2)
    base = ScanResult([row for row in adapted.rows if row.adapter == "base"], [], {})
    assert adapted.table5("cols") == base.table5("cols")
    merged = adapted.table5("cols", "merged")
    expected = [
        r.pii for r in adapted.rows if (r.adapter, r.vectors, r.layer, r.role) == ("merged", "cols", "1", "Query")
    ]
    assert [merged.cells["1", "Query"]] == expected
    assert ("1", "Keys") not in merged.cells
    experts = synthetic.experts(layers=1, count=4)
    spread = experts.table5("rows").spreads["0", "Linear_1.weight"]
    values = [r.pii for r in experts.rows if (r.role, r.vectors) == ("Linear_1.weight", "rows")]
    assert (spread.min, spread.max, spread.count) == (min(values), max(values), 4)


def test_many_matrices_outside_the_table_are_told_by_role() -> None:
    result = synthetic.experts(layers=4, count=8)
    alone = Row("lm_head.weight", None, "Head", "rows", 9, 4, 0.5, 0.4, 1.25, 0, 0, None)
    broken = Row("experts.9", "3", "Linear_1.gate", "rows", None, None, None, None, None, None, None, "torn")
    result.rows += [alone, broken]
    listed, lines = condensed(result.outside_table())
    assert listed == [alone, broken]
    values = [row.pii for row in result.rows if (row.role, row.vectors) == ("Linear_1.gate", "cols")]
    assert ["Linear_1.gate", "cols", "32", f"{sum(values) / 32:.4f}"] in [line[:4] for line in lines]  # type: ignore[arg-type]
    assert result.to_markdown().count("\n") < 80
    few = ScanResult(result.rows[:6], [], {})
    assert condensed(few.outside_table()) == (few.outside_table(), [])


def test_the_papers_table_takes_columns_of_queries_keys_and_values(small: ScanResult) -> None:
    table = small.table5("paper")
    for role in table.columns:
        side = "cols" if role in ("Query", "Keys", "Values") else "rows"
        assert [table.cells[layer, role] for layer in table.layers] == [
            small.table5(side).cells[layer, role] for layer in table.layers
        ]
    with pytest.raises(InputError, match="version needs"):
        small.table5("rows", "after")


def test_a_table_of_too_many_lines_keeps_failures_and_the_furthest_from_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data, "LINES", 3)
    rows = [
        Row(f"m{i}", None, "Other", "rows", 9, 9, 0.3, 0.3, ratio, 0, 0, None)
        for i, ratio in enumerate([1, 4, 1.1, 0.1])
    ]
    rows.append(Row("broken", None, "Other", "rows", None, None, None, None, None, None, None, "no such file"))
    lines, left_out = page_data.lines(rows)
    assert ([line.row.name for line in lines], left_out) == (["m1", "m3", "broken"], 2)
    page = ScanResult(rows, [], {}).to_html()
    assert "2 lines near their baseline are left out" in page


def test_histograms_hold_the_shares_and_what_chance_would_give() -> None:
    counts = (0, 10, 60, 25, 5)
    rows = [Row(f"q{i}", str(i), "Query", "rows", 15, 6, 0.3, 0.3, 1.0, 0, 0, None, histogram=counts) for i in (0, 1)]
    found = page_data.histograms(rows, "rows")
    shares = {e["at"]: e["share"] for e in found if e["kind"] == "found" and e["layer"] == "all"}
    assert shares == {-0.4: 0.1, 0.0: 0.6, 0.4: 0.25, 0.8: 0.05}
    assert {e["layer"] for e in found if e["kind"] == "found"} == {"all", "0", "1"}
    chance = {e["at"]: e["share"] for e in found if e["kind"] == "chance"}
    beta = stats.beta(2.5, 2.5, loc=-1, scale=2)
    assert chance[0.0] == pytest.approx(beta.cdf(0.2) - beta.cdf(-0.2), rel=5e-3)
    assert sum(chance.values()) == pytest.approx(1, abs=5e-3)


def test_the_most_parallel_pairs_come_first_and_by_name() -> None:
    rows = [
        Row(f"w{i}", "0", "Query", "rows", 9, 9, 0.3, 0.3, 1.0, 0, 0, None, max_abs=value, max_pair=(i, i + 1))
        for i, value in enumerate([0.5, 0.99, 0.7])
    ]
    rows[0].head = 1
    rows.append(Row("none", "0", "Query", "rows", 1, 9, None, 0.3, None, 0, 0, None, max_abs=None, max_pair=(-1, -1)))
    assert [row.name for row in page_data.pairs(rows)] == ["w1", "w2"]
    page = ScanResult(rows, [], {}).to_html()
    assert "<td>w1</td><td>0</td><td>Query</td><td>rows</td><td>1</td><td>2</td><td>0.9900</td>" in page


def test_skipped_tensors_are_gathered_by_name_and_reason_and_none_is_lost() -> None:
    skipped = [Skipped(f"layers.{i}.norm", "vector") for i in range(40)] + [Skipped("layers.3.norm", "other")]
    assert page_data.reasons(skipped) == [("layers.*.norm", "vector", 40), ("layers.3.norm", "other", 1)]


def test_packed_columns_hold_the_same_records() -> None:
    records = [{"a": i % 2, "b": i / 3, "c": None} for i in range(12)]
    packed = page_data.packed(records)
    assert isinstance(packed["b"], list)
    assert packed["a"] == {"words": [0, 1], "at": [0, 1] * 6}
    assert unpacked(packed) == records
    assert page_data.packed([]) == {}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots_for_papers(suffix: str, small: ScanResult, tmp_path: Path) -> None:
    target = tmp_path / f"plot{suffix}"
    small.plot(target, "heat", "rows")
    content = target.read_bytes()
    if suffix == ".png":
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 800
        assert height > 200
    else:
        text = content.decode()
        assert text.startswith("<svg")
        assert "Linear_1.gate" in text
        shown = re.findall(r">(\d\.\d\d)</text>", text)
        ratios = sorted(f"{row.ratio:.2f}" for row in small.rows if row.head is None and row.vectors == "rows")
        assert sorted(shown) == ratios


def test_a_plot_of_everything_or_of_nothing(small: ScanResult, tmp_path: Path) -> None:
    small.write(tmp_path / "all.svg")
    text = (tmp_path / "all.svg").read_text("utf-8")
    for word in (*charts.SIDE_TITLES.values(), "cosine of a pair", "layer", "PII / isotropic baseline"):
        assert word in text
    for arguments, word in (
        (("x.gif",), r"\.png, \.svg"),
        (("x.svg", "pie"), "what needs"),
        (("x.svg", "heat", "heads"), "side needs"),
    ):
        with pytest.raises(InputError, match=word):
            small.plot(*arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to draw"):
        ScanResult([], [], {}).plot(tmp_path / "x.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["all.svg"]


def test_an_adapters_effect_stands_on_the_page() -> None:
    page = synthetic.adapted(layers=2).to_html()
    assert {"bars-rows", "bars-cols", "moved-rows", "moved-cols"} <= set(data_of(page))
    assert "Before and after" in page
    assert '<th scope="col" class="word" data-kind="word"><button type="button">version' in page
    assert "Before and after" not in synthetic.dense(layers=2, heads=False).to_html()
