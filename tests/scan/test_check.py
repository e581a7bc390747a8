"""The gate: what conditions select and mean, what fails, what is refused, and the three ways of saying so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orthofast import cli
from orthofast.errors import InputError
from orthofast.scan import Row, ScanResult
from orthofast.scan.gate import judge, parse_condition


def row(name: str, role: str, layer: str, pii: float | None, side: str = "rows", **more: object) -> Row:
    made = Row(name, layer, role, side, 8, 4, pii, 0.4, None if pii is None else pii / 0.4, 0, 0, None)
    for field, value in more.items():
        setattr(made, field, value)
    return made


@pytest.fixture
def result() -> ScanResult:
    rows = [
        row("layers.0.q", "Query", "0", 0.9),
        row("layers.1.q", "Query", "1", 0.3),
        row("layers.10.q", "Query", "10", 0.5, "cols"),
        row("layers.0.up", "Linear_1.weight", "0", 0.4),
        row("layers.0.q", "Query", "0", 0.95, head=3),
        row("layers.0.up", "Linear_1.weight", "0", 1.0, adapter="delta"),
        row("layers.0.down", "Linear_2.weight", "0", None, error="it holds NaN", nonfinite=2),
    ]
    return ScanResult(rows, [], {})


@pytest.fixture
def stored(result: ScanResult, tmp_path: Path) -> str:
    result.rows[-1].error = None
    result.write(tmp_path / "result.json")
    return str(tmp_path / "result.json")


def violations(result: ScanResult, text: str) -> list[tuple[str, float]]:
    (verdict,) = judge(result, [parse_condition(text)])
    return [(violation.name, violation.value) for violation in verdict.violations]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pii > 0.8", ["layers.0.q"]),
        ("pii >= 0.5", ["layers.0.q", "layers.10.q"]),
        ("pii_ratio>2", ["layers.0.q"]),
        ("ratio > 200%", ["layers.0.q"]),
        ("role=Query: pii > 0.4", ["layers.0.q", "layers.10.q"]),
        ("role=query, vectors=rows: pii > 0.4", ["layers.0.q"]),
        ("role=Linear_1: pii > 0.3", ["layers.0.up"]),
        ("layer=1*: pii > 0", ["layers.1.q", "layers.10.q"]),
        ("name=layers.0.*: pii > 0", ["layers.0.q", "layers.0.up"]),
        ("head=*: pii > 0.9", ["layers.0.q"]),
        ("adapter=delta: pii > 0.9", ["layers.0.up"]),
        ("nonfinite > 0", ["layers.0.down"]),
        ("failed > 0", ["layers.0.down"]),
        ("pii < 0", []),
        ("n != 8", []),
        ("pii == 3e-1", ["layers.1.q"]),
    ],
)
def test_a_condition_fails_on_each_row_beyond_its_bound(text: str, expected: list[str], result: ScanResult) -> None:
    assert [name for name, _ in violations(result, text)] == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("mean(pii) > 0", (0.9 + 0.3 + 0.5 + 0.4) / 4),
        ("role=Query: max(pii) > 0.8", 0.9),
        ("role=Query: min(pii) > 0.2", 0.3),
        ("count(pii) >= 4", 4.0),
        ("mean(pii) > 0.9", None),
    ],
)
def test_a_summary_judges_all_rows_together(text: str, value: float | None, result: ScanResult) -> None:
    assert [found for _, found in violations(result, text)] == ([] if value is None else [pytest.approx(value)])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("pii", "needs the form"),
        ("pii > lots", "needs the form"),
        ("pii > 1.2.3", "a number as its bound"),
        ("beauty > 1", "needs one of the measures"),
        ("median(pii) > 1", "needs one of mean, min, max, count"),
        ("colour=red: pii > 1", "selectors such as role=Query"),
        ("role: pii > 1", "selectors such as role=Query"),
        ("", "needs the form"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        parse_condition(text)


def test_a_condition_that_can_judge_nothing_is_refused_not_passed(result: ScanResult) -> None:
    with pytest.raises(InputError, match=r"selects no row; the result has the roles Linear_1\.weight"):
        violations(result, "role=Quer: pii > 0")
    with pytest.raises(InputError, match="which no selected row of the result has"):
        violations(result, "max_abs > 0.9")
    with pytest.raises(InputError, match="needs a baseline"):
        violations(result, "change > 10%")
    with pytest.raises(InputError, match="needs a condition"):
        judge(result, [])


def test_a_change_is_measured_against_the_older_result(result: ScanResult) -> None:
    older = ScanResult([row("layers.0.q", "Query", "0", 0.8), row("layers.1.q", "Query", "1", 0.4)], [], {})
    (verdict,) = judge(result, [], older, 0.2)
    assert [(v.name, v.value) for v in verdict.violations] == [("layers.1.q", pytest.approx(-0.25))]
    assert verdict.rows == 2
    (verdict,) = judge(result, [parse_condition("change > 10%")], older)
    assert [v.name for v in verdict.violations] == ["layers.0.q"]
    gone = ScanResult([row("layers.99.q", "Query", "99", 0.8)], [], {})
    (verdict,) = judge(result, [], gone, 0.2)
    assert [v.name for v in verdict.violations] == ["layers.99.q"]
    with pytest.raises(InputError, match="holds no measured matrix"):
        judge(result, [], ScanResult([], [], {}), 0.2)


def test_the_command_exits_with_1_and_names_what_failed(stored: str) -> None:
    runner = CliRunner()
    done = runner.invoke(cli.app, ["check", stored, "--fail-if", "role=Query: pii > 0.6", "--fail-if", "pii > 0.95"])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "FAILED  1 of 3 values: role=Query: pii > 0.6"
    assert lines[1].split() == ["layers.0.q", "rows", "0.9"]
    assert lines[2] == "passed  none of 4 values: pii > 0.95"
    assert runner.invoke(cli.app, ["check", stored, "--fail-if", "pii > 0.95"]).exit_code == 0


def test_the_json_and_github_forms(stored: str) -> None:
    runner = CliRunner()
    done = runner.invoke(cli.app, ["check", stored, "--fail-if", "max(ratio) > 200%", "--format", "json"])
    document = json.loads(done.stdout)
    assert (done.exit_code, document["passed"], document["complete"]) == (1, False, True)
    assert document["checks"][0]["violations"][0]["value"] == pytest.approx(2.25)
    arguments = ["--fail-if", "ratio > 200%", "--fail-if", "n<0", "--format", "github"]
    done = runner.invoke(cli.app, ["check", stored, *arguments])
    assert done.stdout.splitlines() == [
        "::error title=orthofast check::ratio > 200%25: layers.0.q rows 2.25",
        "::notice title=orthofast check::passed: n<0",
    ]


def test_a_name_cannot_end_a_workflow_command(tmp_path: Path) -> None:
    ScanResult([row("a\n::set-env::b%", "Query", "0", 0.9)], [], {}).write(tmp_path / "r.json")
    arguments = ["check", str(tmp_path / "r.json"), "--fail-if", "pii>0", "--format", "github"]
    lines = CliRunner().invoke(cli.app, arguments).stdout.splitlines()
    assert len(lines) == 1
    assert "b%25" in lines[0]


def test_an_incomplete_scan_does_not_pass_silently(tmp_path: Path) -> None:
    runner = CliRunner()
    failed = ScanResult([row("a", "Query", "0", 0.5), row("b", "Query", "1", None, error="torn")], [], {})
    stopped = ScanResult([row("a", "Query", "0", 0.5)], [], {"interrupted": True})
    for result in (failed, stopped):
        result.write(tmp_path / "r.json")
        arguments = ["check", str(tmp_path / "r.json"), "--fail-if", "pii > 0.9"]
        done = runner.invoke(cli.app, arguments)
        assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
        assert "not judged" in done.stderr
        assert runner.invoke(cli.app, [*arguments, "--allow-partial"]).exit_code == 0
        assert runner.invoke(cli.app, [*arguments, "--fail-if", "pii > 0.1"]).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--fail-if", "pii"], "needs the form"),
        ([], "needs a condition"),
        (["--max-delta", "10%"], "needs a baseline"),
        (["--max-delta", "much"], "--max-delta needs"),
        (["--fail-if", "pii>1", "--format", "xml"], "--format needs"),
        (["--fail-if", "pii>1", "--baseline", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_wrong_usage_gives_code_2(arguments: list[str], word: str, stored: str) -> None:
    done = CliRunner().invoke(cli.app, ["check", stored, *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert word in done.stderr


def test_a_baseline_on_the_command_line(stored: str, result: ScanResult, tmp_path: Path) -> None:
    result.rows[0].pii = 0.8
    result.write(tmp_path / "old.json")
    arguments = ["check", stored, "--baseline", str(tmp_path / "old.json"), "--max-delta"]
    done = CliRunner().invoke(cli.app, [*arguments, "10%"])
    assert done.exit_code == 1
    assert "layers.0.q rows +12.50 %" in done.stdout
    assert CliRunner().invoke(cli.app, [*arguments, "0.2"]).exit_code == 0
