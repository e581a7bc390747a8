"""The gallery: pages say what the recorded numbers say, figures are drawn once, what does not fit stops the build."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import docutils_namespace, patch_docutils

from docs import gallery_directives, gallery_figures, recorded
from docs.recorded import Record, Run
from orthofast.lab.experiment import Absent, Settings
from orthofast.lab.registry import REGISTRY, RUNNABLE
from orthofast.lab.runs import plain

ROOT = Path(__file__).parents[1]
INDEX = "# All\n\n```{toctree}\nridge\nothers\n```\n\n```{lab-verdicts}\n```\n"
RIDGE = "# Ridge\n\n```{lab-paper} S3\n```\n"
OTHERS = "# Others\n\n" + "\n\n".join(f"```{{lab-paper}} {key}\n```" for key in ("S0", "S1", "S2"))
ABOUT = {
    "commit": "0123456789ab",
    "versions": {"torch": "2.0"},
    "machine": {"cores": 2},
    "data": "digits",
    "scale": "small",
    "device": "cpu",
}
CLOSED_FORM = "S3-F1"  # takes milliseconds, no data
Build = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def record() -> Record:
    raw = plain(RUNNABLE[CLOSED_FORM].run(Settings()))
    status = RUNNABLE[CLOSED_FORM].verdict([raw]).status
    return Record(ABOUT, {CLOSED_FORM: Run([0], 1.2, "a <b>small</b> size", status, [raw])})


@pytest.fixture
def _reads_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment as if it read data."""
    entry = replace(RUNNABLE[CLOSED_FORM], needs=("digits", "mnist"))
    monkeypatch.setattr(recorded, "RUNNABLE", RUNNABLE | {CLOSED_FORM: entry})


@pytest.fixture
def build(tmp_path: Path, record: Record) -> Build:
    """Builds the pages from the record, or from others, without a warning; their text by name."""
    sources = tmp_path / "manual"
    (sources / "results").mkdir(parents=True)
    (sources / "index.md").write_text(INDEX)
    (sources / "others.md").write_text(OTHERS)

    def built(*records: Record, page: str = RIDGE) -> dict[str, str]:
        (sources / "ridge.md").write_text(page)
        for one in records or (record,):
            (sources / "results" / f"lab-{one.key}.json").write_text(recorded.text_of(one))
        gallery_directives.gallery.cache_clear()
        settings = {
            "extensions": "myst_parser,docs.gallery_directives",
            "html_theme": "basic",
            "exclude_patterns": "_build",
        }
        with patch_docutils(), docutils_namespace():
            places = (sources, sources / "_build" / "html", sources / "_build" / "trees")
            said = io.StringIO()
            app = Sphinx(sources, None, *places[1:], "html", settings, status=None, warning=said)
            app.build()
        assert said.getvalue() == ""
        return {file.stem: file.read_text() for file in places[1].glob("*.html")}

    return built


def test_a_recorded_experiment_has_its_verdict_numbers_and_both_figures(build: Build, tmp_path: Path) -> None:
    pages = build()
    ridge, index = pages["ridge"], pages["index"]
    entry = RUNNABLE[CLOSED_FORM]
    section = ridge[ridge.index('id="s3-f1"') : ridge.index('<span class="pre">S3-F1</span>')]
    assert f"{CLOSED_FORM}: {entry.title}" in section
    assert entry.claim in section
    assert "✓ reproduced</span>, 1 seed" in section
    assert "Here: a &lt;b&gt;small&lt;/b&gt; size" in section
    checks = entry.verdict(recorded.read(tmp_path / "manual" / "results" / "lab-digits.json").runs[CLOSED_FORM].raws)
    assert [check.what in section for check in checks.checks] == [True] * len(checks.checks)
    assert section.count("✓ holds") == sum(check.holds is not None for check in checks.checks)
    images = re.findall(r'<img class="only-(\w+)" src="([^"]+)" alt="([^"]+)" width="(\d+)" height="(\d+)"', section)
    assert [theme for theme, *_ in images] == ["light", "dark"]
    drawn = [(tmp_path / "manual" / "_build" / "html" / source).read_text() for _, source, *_ in images]
    assert all(text.startswith("<svg") and entry.title in text for text in drawn)
    assert drawn[0] != drawn[1]
    assert all(
        "4 of 4 conditions hold" in alt and min(int(width), int(height)) > 100 for *_, alt, width, height in images
    )
    # the others of the paper are there, and said to be unrecorded
    assert re.findall(r'<section class="lab-entry" id="([\w-]+)"', ridge) == [
        key.lower() for key in REGISTRY if key.startswith("S3-")
    ]
    assert "? not recorded" in ridge
    assert '<a class="reference internal" href="ridge.html#s3-f1"><span class="std std-ref">S3-F1</span></a>' in index
    assert "1 <span" in index
    assert "The numbers of every seed" in index
    assert len(list((tmp_path / "manual" / "_build" / "html" / "_downloads").rglob("lab-digits.json"))) == 1


def test_what_is_not_run_shows_its_reason_and_the_published_numbers(build: Build) -> None:
    absent = next(one for one in REGISTRY.values() if isinstance(one, Absent) and one.published)
    assert not absent.id.startswith("S3")
    page = build()["others"]
    section = page[page.index(f'id="{absent.id.lower()}"') :]
    section = section[: section.index("</section>")]
    assert "– not run here" in section
    assert absent.reason in section
    for what, published in absent.published.items():
        assert what in section
        assert published in section


def test_figures_are_drawn_again_only_where_they_change(
    build: Build, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    drawn: list[str] = []
    real = gallery_figures.vl_convert.vegalite_to_svg
    monkeypatch.setattr(gallery_figures.vl_convert, "vegalite_to_svg", lambda spec: drawn.append(spec) or real(spec))
    build()
    assert drawn == []
    run = record.runs[CLOSED_FORM]
    more = Record(ABOUT, {CLOSED_FORM: Run([0, 1], 1.2, "", run.status, run.raws * 2)})
    assert "✓ reproduced</span>, 2 seeds" in build(more)["ridge"]
    assert len(drawn) == 1  # the dark one is the light one in other colours


@pytest.mark.usefixtures("_reads_data")
def test_a_second_data_set_stands_beside_the_first(build: Build, record: Record) -> None:
    pages = build(record, Record(ABOUT | {"data": "mnist"}, record.runs))
    assert "✓ reproduced</span> on digits, 1 seed · " in pages["ridge"]
    assert "✓ reproduced</span> on MNIST, 1 seed" in pages["ridge"]
    assert "The figure of MNIST" in pages["ridge"]
    assert [pages["ridge"].count(f'src="_images/S3-F1-{data}-dark.svg"') for data in ("digits", "mnist")] == [1, 1]
    assert pages["index"].index("<strong>digits</strong>") < pages["index"].index("<strong>MNIST</strong>")


def test_a_changed_number_turns_the_verdict_on_the_pages(build: Build, record: Record) -> None:
    run = record.runs[CLOSED_FORM]
    raw = run.raws[0] | {"formula_error": 0.1}
    pages = build(Record(ABOUT, {CLOSED_FORM: Run([0], 1.2, "", run.status, [raw])}))
    assert "✗ not reproduced</span>, 1 seed" in pages["ridge"]
    assert "✗ does not hold" in pages["ridge"]
    assert "✗ not reproduced" in pages["index"]


def test_a_record_that_does_not_fit_stops_the_build_and_is_named(build: Build, record: Record) -> None:
    run = record.runs[CLOSED_FORM]
    with pytest.raises(ExtensionError, match="S3-F1 as recorded on digits cannot be judged"):
        build(Record(ABOUT, {CLOSED_FORM: Run([0], 1.2, "", run.status, [{}])}))
    with pytest.raises(ExtensionError, match="S9-F9 is recorded on digits, but no experiment"):
        build(Record(ABOUT, {"S9-F9": run}))


def test_a_figure_that_cannot_be_drawn_is_named(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such mark")

    monkeypatch.setattr(gallery_figures, "declaration", broken)
    with pytest.raises(ValueError, match=r"S3-F1 as recorded on digits cannot be drawn \(ValueError: no such mark\)"):
        gallery_figures.draw("digits", recorded.judge(record).values(), tmp_path)


def test_an_unknown_paper_is_refused(build: Build) -> None:
    with pytest.raises(AssertionError, match="lab-paper needs one of S0, S1, S2, S3, got 'S7'"):
        build(page=f"{RIDGE}\n```{{lab-paper}} S7\n```\n")


@pytest.mark.parametrize("package", ["vl_convert"])
def test_a_missing_package_is_named_with_its_extra(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import docs.gallery_directives"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert "pip install 'orthofast[lab]'" in last
    assert package in last
