"""The house stands as drawn: layers, lazy doors, names, sizes, a lean import, and backends named in one room only."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from orthofast.kernels import dispatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "orthofast"
LAYERS = {
    "errors": 0,
    "views": 1,
    "records": 1,
    "kernels": 2,
    "metrics": 3,
    "distributed": 3,
    "training": 4,
    "scan": 4,
    "facade": 5,
    "lab": 6,
}
ROOM_OF = {
    "__init__": "facade",
    "cli": "facade",
    "commands": "facade",
    "__main__": "facade",
    "_cpu": "kernels",
    "_cuda": "kernels",
}
LAZY_DOORS = ("__init__.py", "kernels/dispatch.py")
LONGEST = 420
FORBIDDEN = ("utils", "util", "helpers", "helper", "common", "misc", "base")
# the names the facade may have, as drawn; those marked True are there
FACADE = {
    "pii": True,
    "max_coherence": True,
    "cosine_histogram": True,
    "orthogonality_gap": True,
    "diagonal_dominance": True,
    "conformal_drift": True,
    "gram_stats": True,
    "GramStats": True,
    "isotropic_baseline": True,
    "conditioning": True,
    "Monitor": True,
    "pii_loss": True,
    "orthogonalize_": True,
    "scan_checkpoint": True,
    "use_backend": True,
    "explain": True,
    "OrthofastError": True,
    "__version__": True,
}
HEAVY = (
    "triton",
    "numba",
    "llvmlite",
    "safetensors",
    "rich",
    "typer",
    "transformers",
    "lightning",
    "torchmetrics",
    "altair",
    "vl_convert",
    "jinja2",
    "sklearn",
    "scipy",
    "pandas",
)

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for room in ("tests", "benchmarks") for path in (ROOT / room).rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(parts: tuple[str, ...]) -> str:
    """Room of a module given below the package, such as ('kernels', 'dispatch')."""
    first = parts[0] if parts else "__init__"
    return ROOM_OF.get(first, first)


def imported(node: ast.AST) -> list[tuple[str, ...]]:
    """Dotted names that an import statement asks for, the most precise reading of each."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        return [(*(node.module or "").split("."), alias.name) for alias in node.names]
    return []


def law_broken(path: str, tree: ast.Module) -> Iterator[str]:
    """Imports of a file, given below the package, that reach sideways or up."""
    parts = tuple(Path(path).with_suffix("").parts)
    own = room_of(parts)
    for node in ast.walk(tree):
        for name in imported(node):
            if name[0] != "orthofast":
                continue
            target = room_of(name[1:])
            if target not in LAYERS and len(name) == 2:
                target = "facade"  # from orthofast import pii
            if target not in LAYERS:
                yield f"imports {'.'.join(name)}, which is in no layer"
            elif target != own and LAYERS[target] >= LAYERS[own]:
                yield f"{own} (layer {LAYERS[own]}) imports {'.'.join(name)} of {target} (layer {LAYERS[target]})"


def lazy_imports(tree: ast.Module) -> set[tuple[str, ...]]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {name for function in functions for node in ast.walk(function) for name in imported(node)}


def backends_named(tree: ast.Module) -> Iterator[str]:
    """Places in code, not in docstrings, that name a backend."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    files = set(dispatch.NAMES) | {"_cpu", "_cuda"}
    telling = files - {"reference"}  # an ordinary word too
    for node in ast.walk(tree):
        words: set[str] = set()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words = set(re.findall(r"\w+", node.value)) & telling
        elif isinstance(node, ast.keyword) and node.arg == "backend" and isinstance(node.value, ast.Constant):
            words = {str(node.value.value)} & files
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words = {part for name in imported(node) if name[0] == "orthofast" for part in name} & files
        elif isinstance(node, ast.Name | ast.Attribute):
            words = {node.id if isinstance(node, ast.Name) else node.attr} & telling
        yield from (f"line {getattr(node, 'lineno', '?')} names {word}" for word in sorted(words))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_file_imports_only_from_below_or_its_own_room(path: Path) -> None:
    assert list(law_broken(path.relative_to(PACKAGE).as_posix(), tree_of(path))) == []


@pytest.mark.parametrize(
    ("path", "line", "legal"),
    [
        ("kernels/reference.py", "from orthofast.records import GramStats", True),
        ("kernels/reference.py", "from orthofast.kernels import dispatch", True),
        ("kernels/native_cpu.py", "from orthofast import _cpu", True),
        ("metrics/coherence.py", "from orthofast.kernels import gram_stats", True),
        ("metrics/coherence.py", "from orthofast import errors", True),
        ("cli.py", "from orthofast import __version__", True),
        ("lab/lu2024.py", "from orthofast import pii", True),
        ("records.py", "from orthofast.views import rows", False),
        ("records.py", "import orthofast.kernels.dispatch", False),
        ("kernels/reference.py", "from orthofast import metrics", False),
        ("scan/plan.py", "from orthofast.training import Monitor", False),
        ("training/monitor.py", "def f():\n    from orthofast.scan import plan", False),
        ("metrics/gram.py", "from orthofast import pii", False),
        ("errors.py", "import orthofast", False),
        ("scan/plan.py", "from orthofast.helpers.text import wrap", False),
    ],
)
def test_the_law_itself_tells_right_from_wrong(path: str, line: str, legal: bool) -> None:
    assert (list(law_broken(path, ast.parse(line))) == []) == legal


def test_imports_inside_functions_are_of_optional_packages_each_owned_by_one_file() -> None:
    owners: dict[str, set[str]] = {}
    wrong = []
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        if place in LAZY_DOORS:
            continue
        for name in lazy_imports(tree_of(path)):
            if name[0] in sys.stdlib_module_names or name[0] in ("torch", "numpy"):
                wrong.append(f"{place} imports {'.'.join(name)} inside a function")
            elif name[0] == "orthofast":
                wrong.append(f"{place} imports {'.'.join(name)} of our own inside a function")
            else:
                owners.setdefault(name[0], set()).add(place)
    wrong += [
        f"{package} is imported inside functions of {sorted(files)}"
        for package, files in owners.items()
        if len(files) > 1
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.relative_to(PACKAGE).parts[0] != "kernels"], ids=relative
)
def test_nobody_outside_kernels_names_a_backend(path: Path) -> None:
    assert list(backends_named(tree_of(path))) == []


@pytest.mark.parametrize(
    "line",
    [
        "gram_stats(x, backend='reference')",
        "name = 'native_cpu'",
        "from orthofast.kernels import numba_cpu",
        "import orthofast.kernels.reference",
        "kernels.native_cpu.gram_stats(request)",
        "text = 'served by numba_cpu here'",
    ],
)
def test_naming_a_backend_is_noticed(line: str) -> None:
    assert list(backends_named(ast.parse(line)))
    assert not list(backends_named(ast.parse('"""The reference and native_cpu."""\nx = "for reference only"')))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=relative)
def test_a_file_starts_with_a_sentence_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    sentence = (ast.get_docstring(tree_of(path)) or "").split("\n\n")[0]
    assert re.match(r"\S.*[.:]$", sentence, re.DOTALL), f"{relative(path)} starts with no sentence on its duty"
    assert len(text.splitlines()) <= LONGEST


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_a_native_file_starts_with_a_sentence_and_is_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.match(r"// \S.+", lines[0])
    assert len(lines) <= LONGEST


def test_forbidden_file_names_are_absent() -> None:
    assert [
        relative(path)
        for path in (*MODULES, *SCRIPTS, *NATIVE)
        if {path.stem, *path.relative_to(ROOT).parts} & set(FORBIDDEN)
    ] == []


def test_every_file_is_in_a_room_that_is_drawn() -> None:
    rooms = {room_of(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}
    assert rooms <= set(LAYERS)


def test_the_facade_has_the_drawn_names_and_no_other() -> None:
    orthofast = importlib.import_module("orthofast")
    assert set(orthofast.__all__) == {name for name, there in FACADE.items() if there}
    assert len(orthofast.__all__) == len(set(orthofast.__all__))
    assert all(getattr(orthofast, name) is not None for name in orthofast.__all__)
    assert set(orthofast.__all__) <= set(dir(orthofast))


def test_no_facade_name_is_a_file_or_room() -> None:
    taken = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert taken & set(FACADE) == set()


def test_importing_orthofast_is_lean_and_starts_no_cuda() -> None:
    code = """
import json, sys
import torch
before = set(sys.modules)
import orthofast
added = set(sys.modules) - before
print(json.dumps([sorted(name.split(".")[0] for name in added), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    added, cuda = json.loads(done.stdout)
    assert "orthofast" in added
    assert set(added) & set(HEAVY) == set()
    assert not cuda


def test_a_first_measurement_loads_no_package_of_another_room() -> None:
    code = """
import json, sys
import torch
before = set(sys.modules)
import orthofast
with orthofast.use_backend("reference"):
    orthofast.pii(torch.eye(3))
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) & set(HEAVY) == set()


@pytest.mark.parametrize("path", [path for path in NATIVE if path.parent.name == "core"], ids=relative)
def test_the_core_knows_neither_python_nor_torch(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in included if re.match(r"(Python\.h|pybind11|torch|ATen|c10)", name)] == []


@pytest.mark.parametrize("path", [path for path in NATIVE if not path.name.startswith("bind_")], ids=relative)
def test_only_the_bindings_know_python(path: Path) -> None:
    assert (
        re.search(r"#\s*include\s*[<\"](Python\.h|pybind11|torch|ATen|c10)", path.read_text(encoding="utf-8")) is None
    )
