"""The facade: names only, rooms loaded on first use, and the same names for people and for type-checkers."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import orthofast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "orthofast"
OPTIONAL = ("triton", "numba", "safetensors", "rich", "typer", "transformers", "lightning", "altair", "jinja2")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_nothing_but_itself() -> None:
    loaded = run(
        "import sys, importlib, typing, __future__; before = set(sys.modules); import orthofast;"
        "print(*sorted(set(sys.modules) - before))"
    )
    assert loaded == "orthofast"


def test_the_names_load_no_optional_package() -> None:
    loaded = run(
        "import sys, torch; before = set(sys.modules); import orthofast;"
        "orthofast.pii, orthofast.gram_stats, orthofast.GramStats, orthofast.explain, orthofast.OrthofastError;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert not set(loaded.split()) & set(OPTIONAL)


@pytest.mark.parametrize("name", orthofast.__all__)
def test_every_name_resolves_and_is_listed(name: str) -> None:
    value = getattr(orthofast, name)
    assert value is getattr(orthofast, name)
    assert name in dir(orthofast)
    if name != "__version__":
        assert inspect.getdoc(value)
        assert value is getattr(importlib.import_module(orthofast._HOME[name]), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'orthofast' has no attribute 'pi'"):
        orthofast.pi  # noqa: B018


def test_rooms_are_one_dot_away() -> None:
    assert (
        run("import orthofast; print(orthofast.metrics.welch_bound(8, 4) == 1 / 7, orthofast.views.VECTORS[0])")
        == "True rows"
    )
    for room in orthofast._ROOMS:
        assert room in dir(orthofast)


def test_no_name_is_that_of_a_file_or_a_room() -> None:
    files = {path.stem for path in PACKAGE.rglob("*.py")} | {path.name for path in PACKAGE.rglob("*") if path.is_dir()}
    assert not set(orthofast.__all__) & (files - {"__init__"})


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    assert len(blocks) == 1
    homes = {
        alias.name: node.module for node in blocks[0].body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert homes == orthofast._HOME
    assert {*homes, "__version__"} == set(orthofast.__all__)


@pytest.mark.parametrize("name", sorted(set(orthofast.__all__) - {"GramStats", "OrthofastError", "__version__"}))
def test_few_parameters_and_keywords_after_the_tensors(name: str) -> None:
    parameters = inspect.signature(getattr(orthofast, name)).parameters.values()
    positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(positional) <= 2
    # a scan names all that decides its numbers; how it runs is in ScanOptions
    assert len(parameters) - len(positional) <= (11 if name == "scan_checkpoint" else 6)


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert orthofast.__version__ == project["version"]


def test_explain_prints_a_table_of_the_backends() -> None:
    found = orthofast.explain(torch.ones(4, 3))
    assert sum(line.serves for line in found) == 1
    assert {line.backend for line in found} >= {"native_cpu", "numba_cpu", "reference"}
    lines = str(found).splitlines()
    assert len(lines) == len(found)
    for text, line in zip(lines, found, strict=True):
        assert text.startswith("* " if line.serves else "  ")
        assert line.backend in text
        assert text.endswith(line.reason)


def test_use_backend_sends_calls_to_the_one_it_names() -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with orthofast.use_backend("reference"):
        inside = orthofast.pii(weight).item()
    assert inside == orthofast.pii(weight, backend="reference").item()
    with pytest.raises(orthofast.OrthofastError, match="backend needs one of"), orthofast.use_backend("abacus"):
        pass
