"""The page of checks names tests that exist, all checks by their numbers, and experiments of the registry."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from orthofast.lab.experiment import Experiment
from orthofast.lab.registry import REGISTRY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers" / "acceptance.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 70
    assert PAGE.count("tests/") == len(named), "a name is not in the form that is looked up"
    missing = [f"{file}::{name}" for file, name in named if name and name not in functions(file)]
    assert not missing
    assert all((ROOT / file).is_file() for file, _ in named)


def test_every_check_has_its_row_and_a_test() -> None:
    checks = [row for row in ROWS if re.fullmatch(r"\d+b?", row[0])]
    assert {row[0] for row in checks} == {str(number) for number in range(1, 31)} | {"29b"}
    assert all("::test_" in row[2] for row in checks)


def test_every_experiment_is_in_the_registry_and_its_verdict_is_judged_in_the_file_named() -> None:
    listed = [row for row in ROWS if row[0].startswith("`S")]
    keys = [row[0].strip("`") for row in listed]
    assert len(keys) == len(set(keys)) == 20
    for key, row in zip(keys, listed, strict=True):
        experiment = REGISTRY.get(key)
        assert isinstance(experiment, Experiment), key
        judged = (ROOT / row[2].strip("`").split("::")[0]).read_text(encoding="utf-8")
        names = (f'"{key}"', f".{experiment.verdict.__name__}", f"{experiment.verdict.__name__},")
        assert any(name in judged for name in names), key
