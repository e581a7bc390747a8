"""The documentation says what is so: its Python runs, its links, targets, commands and files exist."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orthofast

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?!https?:|#)([^)#\s]+)")
MAKE = re.compile(r"(?:^|`|\s)make ((?:[a-z]+(?:-[a-z]+)*)(?= |`|$|,|;))", re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str) -> dict[str, str]:
    """All fenced blocks of a language, joined per page, so that later ones may use earlier names."""
    found = {}
    for page in PAGES:
        code = [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]
        if code:
            found[named(page)] = "\n".join(code)
    return found


PYTHON = blocks("python")


@pytest.mark.parametrize("page", PYTHON)
def test_python_of_a_page_runs(page: str) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        exec(compile(PYTHON[page], page, "exec"), {"__name__": "page"})
    finally:
        torch.set_num_threads(threads)


def test_readme_and_quickstart_show_python() -> None:
    assert {"README.md", "docs/quickstart.md"} <= PYTHON.keys()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_make_targets_named_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    code = re.compile(r"`[^`\n]+`|^```sh\n.*?^```", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for piece in code.findall(page.read_text(encoding="utf-8")):
            assert set(MAKE.findall(piece)) <= targets, f"{named(page)}: {piece}"


@pytest.mark.parametrize("command", ["scan", "inspect", "diff", "report", "check", "demo", "doctor", "lab"])
def test_options_named_in_the_pages_are_in_the_help(command: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "from orthofast.cli import main; main()", command, "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if f"orthofast {command}" in line:
                for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*\b", line.split(f"orthofast {command}", 1)[1]):
                    assert option in shown.stdout, f"{named(page)} names {option}: {line}"


ROOMS = ("distributed", "kernels", "lab", "metrics", "scan", "training")
API = (ROOT / "docs" / "api.md", *sorted((ROOT / "docs" / "api").glob("*.md")))
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto(?!summary)[a-z]+):: (\S+)", re.MULTILINE)


def documented() -> set[str]:
    """Full names of all that the pages of the reference document."""
    names = set()
    for page in API:
        module = ""
        for kind, name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if kind == "currentmodule":
                module = name
            else:
                names.add(f"{module}.{name}")
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_of_a_room_is_in_the_reference(room: str) -> None:
    public = importlib.import_module(f"orthofast.{room}").__all__
    assert {f"orthofast.{room}.{name}" for name in public} - documented() == set()


def test_every_name_of_the_facade_is_listed_first_and_documented() -> None:
    listed = set(re.findall(r"^   ~(orthofast\.\S+)$", API[0].read_text(encoding="utf-8"), re.MULTILINE))
    assert {name.rpartition(".")[2] for name in listed} == set(orthofast.__all__) - {"__version__"}
    assert listed <= documented()


def test_every_name_of_the_reference_exists() -> None:
    for full in documented():
        module, _, name = full.rpartition(".")
        assert hasattr(importlib.import_module(module), name), full


def test_every_file_of_the_house_stands_on_its_page_and_no_other() -> None:
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `((?:orthofast|csrc)/[^`]+)`", text, re.MULTILINE))
    real = {
        str(path.relative_to(ROOT))
        for room in ("orthofast", "csrc")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix in {".py", ".pyi", ".json", ".j2", ".h", ".cpp", ".cu", ".cuh"}
    }
    assert listed == real


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_help_lists_every_public_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    public = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split())
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == public
