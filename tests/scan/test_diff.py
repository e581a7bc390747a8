"""Two checkpoints or results compared: statuses, drift and size of the change against float64, files, exit codes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from orthofast import cli
from orthofast.errors import InputError
from orthofast.scan import Row, ScanResult, scan_checkpoint
from orthofast.scan.comparison import Comparison, compare, compare_rows, relative, versions_of
from orthofast.scan.diffing import compare_checkpoints, relative_change
from orthofast.scan.plan import make_plan
from orthofast.scan.provenance import measure
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.renaming import renamer
from tests.scan import synthetic
from tests.scan.checkpoints import FAMILIES, make_tensors, numpy_pii, write

Q, K, O = (f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "qko")  # noqa: E741
TOLERANCE = 1e-6  # of a float32 fold against float64


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with queries scaled, keys changed, one tensor gone, one added, one of another size."""
    family = FAMILIES["llama"]
    before = make_tensors(family)
    after = dict(before)
    after[Q] = before[Q] * torch.linspace(0.5, 2.0, 16)[:, None]
    after[K] = before[K] + 0.3 * torch.randn(before[K].shape, generator=torch.Generator().manual_seed(3))
    del after["model.layers.0.mlp.up_proj.weight"]
    after["model.layers.0.mlp.new_proj.weight"] = torch.randn(4, 16)
    after["lm_head.weight"] = torch.randn(40, 16)
    return write(tmp_path / "before", before, family.config), write(tmp_path / "after", after, family.config)


def cosines(weight: torch.Tensor) -> np.ndarray:
    vectors = weight.double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(unit), 1)])


def compared(pair: tuple[Path, Path], **options: object) -> Comparison:
    plans = [make_plan(open_checkpoint(path)) for path in pair]
    return compare_checkpoints(*plans, measure, **options)  # type: ignore[arg-type]


def test_every_tensor_of_two_checkpoints_has_its_status(pair: tuple[Path, Path]) -> None:
    found = compared(pair)
    assert found.names("missing") == ["model.layers.0.mlp.up_proj.weight"]
    assert found.names("added") == ["model.layers.0.mlp.new_proj.weight"]
    assert found.names("reshaped") == ["lm_head.weight"]
    assert set(found.names("changed")) == {Q, K}
    assert found.names("failed") == []
    shared = set(FAMILIES["llama"].tensors) - {"model.layers.0.mlp.up_proj.weight", "lm_head.weight", Q, K}
    measured = {name for name in shared if FAMILIES["llama"].tensors[name][1] is not None}
    assert set(found.names("equal")) == measured
    same = [change for change in found.changes if change.status == "equal"]
    assert {(change.drift, change.relative_change, change.relative) for change in same} == {(0.0, 0.0, 0.0)}
    note = next(change.note for change in found.changes if change.status == "reshaped" and change.vectors == "rows")
    assert note == "31 vectors of 16 before, 40 of 16 after"


def test_pii_drift_and_size_of_the_change_equal_float64(pair: tuple[Path, Path]) -> None:
    found = {(c.name, c.vectors): c for c in compared(pair).changes}
    before = make_tensors(FAMILIES["llama"])
    for name in (Q, K):
        old = before[name]
        new = (
            old * torch.linspace(0.5, 2.0, 16)[:, None]
            if name == Q
            else old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
        )
        size = float((new.double() - old.double()).norm() / old.double().norm())
        for side, a, b in (("rows", old, new), ("cols", old.T, new.T)):
            change = found[name, side]
            assert change.before == pytest.approx(numpy_pii(a.numpy()), abs=TOLERANCE)
            assert change.after == pytest.approx(numpy_pii(b.numpy()), abs=TOLERANCE)
            drift = float(np.abs(np.abs(cosines(a)) - np.abs(cosines(b))).mean())
            assert change.drift == pytest.approx(drift, abs=TOLERANCE)
            assert change.relative_change == pytest.approx(size, rel=1e-9)
            assert change.relative == pytest.approx((change.after - change.before) / change.before)  # type: ignore[operator]
    assert found[Q, "rows"].drift == pytest.approx(0.0, abs=TOLERANCE)  # lengths play no part in angles
    assert (found[Q, "cols"].drift or 0.0) > 0.01
    without = {(c.name, c.vectors): c for c in compared(pair, drift=False).changes}
    assert without[K, "rows"].drift is None
    assert without[K, "rows"].relative_change == found[K, "rows"].relative_change


def test_the_rows_of_a_diff_are_those_of_two_scans(pair: tuple[Path, Path]) -> None:
    found = {(c.name, c.vectors): (c.before, c.after) for c in compared(pair).changes}
    old, new = ({(r.name, r.vectors): r.pii for r in scan_checkpoint(path).rows} for path in pair)
    assert found == {key: (old.get(key), new.get(key)) for key in {**old, **new}}


def test_values_stored_in_another_type_are_equal(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    narrow = {name: tensor.bfloat16() for name, tensor in make_tensors(family).items()}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    found = compared((write(tmp_path / "a", narrow, family.config), write(tmp_path / "b", wide, family.config)))
    assert set(found.counts()) == {"equal"}


def test_a_tensor_that_fails_on_one_side_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = make_tensors(FAMILIES["llama"])
    tensors[O][2, 3] = float("nan")
    found = compared((pair[0], write(tmp_path / "nan", tensors, FAMILIES["llama"].config)))
    assert set(found.names("failed")) == {O}
    assert "NaN or Inf" in next(change.note or "" for change in found.changes if change.status == "failed")


def test_results_are_compared_by_name_side_head_and_expert() -> None:
    before, after = synthetic.dense(layers=2, seed=1), synthetic.dense(layers=3, seed=2)
    found = compare(before, after)
    assert len(found.changes) == len(after.rows)
    assert found.counts() == {"changed": len(before.rows), "added": len(after.rows) - len(before.rows)}
    old = {(row.name, row.vectors, row.head): row.pii for row in before.rows}
    for change in found.changes:
        if change.status == "changed":
            assert change.before == old[change.name, change.vectors, change.head]
    shift = found.by_role()["rows", "Query"]
    moved = [c for c in found.changes if (c.role, c.vectors, c.head, c.status) == ("Query", "rows", None, "changed")]
    assert shift.count == len(moved) == 2
    assert (shift.least, shift.most) == (min(c.relative for c in moved), max(c.relative for c in moved))  # type: ignore[type-var]
    assert list(found.by_layer()) == [("rows", "0"), ("rows", "1"), ("cols", "0"), ("cols", "1")]
    assert compare(before, before).counts() == {"equal": len(before.rows)}
    most = [abs(change.relative or 0) for change in found.most_changed(5)]
    assert len(most) == 5
    assert most == sorted(most, reverse=True)


def test_an_adapters_versions_are_compared_within_one_result() -> None:
    result = synthetic.adapted(layers=2)
    found = versions_of(result)
    assert found is not None
    assert {change.role for change in found.changes} == {"Query", "Values"}
    assert found.counts() == {"changed": 2 * 2 * 2}
    assert all(change.drift and change.relative_change for change in found.changes)
    assert versions_of(synthetic.dense(layers=2)) is None


def test_changes_relative_to_nothing_are_left_open() -> None:
    assert relative(0.2, 0.3) == pytest.approx(0.5)
    assert relative(0.0, 0.3) is None
    assert relative(0.0, 0.0) == 0.0
    assert relative(None, 0.3) is None
    assert relative_change(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert relative_change(torch.zeros(2, 2), torch.ones(2, 2)) == float("inf")
    zero = Row("z", "0", "Query", "rows", 2, 2, 0.0, 0.5, 0.0, 0, 0, None)
    other = Row("z", "0", "Query", "rows", 2, 2, 0.1, 0.5, 0.2, 0, 0, None)
    change = compare_rows([zero], [other])[0]
    assert (change.status, change.relative) == ("changed", None)
    json.loads(Comparison([change]).to_json(), parse_constant=pytest.fail)


def test_plans_of_different_sides_are_refused(pair: tuple[Path, Path]) -> None:
    plans = make_plan(open_checkpoint(pair[0]), vectors="rows"), make_plan(open_checkpoint(pair[1]))
    with pytest.raises(InputError, match="same sides"):
        compare_checkpoints(*plans, measure)


def test_the_forms_of_a_comparison(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compared(pair)
    document = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert (document["kind"], document["schema_version"]) == ("diff", 1)
    assert len(document["changes"]) == len(found.changes)
    assert {entry["role"] for entry in document["by_role"]} >= {"Query", "Keys"}
    lines = list(csv.DictReader(io.StringIO(found.to_csv(), newline="")))
    assert [line["name"] for line in lines] == [change.name for change in found.changes]
    text = found.to_markdown()
    assert "| model.layers.0.mlp.up_proj.weight |" in text
    for suffix in (".json", ".csv", ".md", ".html"):
        found.write(tmp_path / f"diff{suffix}")
        assert (tmp_path / f"diff{suffix}").stat().st_size > 100
    page = (tmp_path / "diff.html").read_text("utf-8")
    assert "Change of PII by role" in page
    assert "before and after" in page
    with pytest.raises(InputError, match=r"\.json, \.csv, \.md, \.html"):
        found.write(tmp_path / "diff.png")


def test_the_command_compares_checkpoints_and_results_alike(pair: tuple[Path, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    before, after = map(str, pair)
    done = runner.invoke(cli.app, ["diff", before, after, "-o", str(tmp_path / "diff.html")])
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    heads = "role vectors matrices before after change smallest largest drift |dW|/|W|"
    assert heads.split() in lines
    assert "only before: model.layers.0.mlp.up_proj.weight" in done.stdout
    assert "other sizes: lm_head.weight" in done.stdout
    assert (tmp_path / "diff.html").exists()
    results = []
    for path in pair:
        results.append(str(tmp_path / f"{path.name}.json"))
        ScanResult.write(scan_checkpoint(path), results[-1])
    direct = json.loads(runner.invoke(cli.app, ["diff", before, after, "--json"]).stdout)
    stored = json.loads(runner.invoke(cli.app, ["diff", *results, "--json"]).stdout)
    mixed = json.loads(runner.invoke(cli.app, ["diff", results[0], after, "--json"]).stdout)
    assert direct["counts"] == stored["counts"] == mixed["counts"]

    def values(document: dict) -> list:
        return [(c["name"], c["vectors"], c["before"], c["after"]) for c in document["changes"]]

    assert values(direct) == values(stored) == values(mixed)
    long = runner.invoke(cli.app, ["diff", *results, "--long"]).stdout
    assert len([line for line in long.splitlines() if " changed " in line]) == 4
    assert runner.invoke(cli.app, ["diff", before, after, "-o", "x.png"]).exit_code == 2
    assert runner.invoke(cli.app, ["diff", before, str(tmp_path / "absent")]).exit_code == 2


def test_a_wrappers_prefix_on_one_side_does_not_count(pair: tuple[Path, Path], tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    bare = {name.removeprefix("model."): tensor for name, tensor in make_tensors(family).items()}
    path = write(tmp_path / "bare", bare, family.config)
    for found in (compared((path, pair[0])), compare(scan_checkpoint(path), scan_checkpoint(pair[0]))):
        assert found.counts() == {"equal": len(found.changes)}
        assert {change.name for change in found.changes} == {row.name for row in scan_checkpoint(pair[0]).rows}
    backwards = compared((pair[1], path))
    assert set(backwards.names("changed")) == {name.removeprefix("model.") for name in (Q, K)}
    changes = {(change.name, change.vectors): change for change in backwards.changes}
    assert (changes[K.removeprefix("model."), "rows"].drift or 0) > 0.01


def test_names_that_have_no_counterpart_stay() -> None:
    rename = renamer([f"a.{i}" for i in range(4)] + ["lone"], [f"b.c.{i}" for i in range(3)])
    assert [rename(name) for name in ("a.0", "a.2", "a.3", "lone")] == ["b.c.0", "b.c.2", "a.3", "lone"]
    chance = renamer(["model.embed.weight", "model.a.x", "model.b.y"], ["wpe.weight", "h.c", "h.d"])
    assert chance("model.embed.weight") == "model.embed.weight"
    same = renamer(["a.w", "a.v"], ["a.w", "x.a.v"])
    assert (same("a.w"), same("a.v")) == ("a.w", "a.v")
