"""The HTML report in a real browser: charts are drawn, sorting and the filter work, nothing is fetched or fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
import torch

from orthofast.scan import ScanOptions, ScanResult, scan_checkpoint
from orthofast.scan.comparison import compare
from tests.scan.checkpoints import FAMILIES, make_tensors, write

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=8000",
)
HOSTILE = "model.layers.7.</script><img src=x onerror=document.title='owned'>.weight"
# runs before the page: keeps every error and every refused or finished request
WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push("error: " + event.message));
addEventListener("unhandledrejection", (event) => problems.push("rejection: " + event.reason));
addEventListener("securitypolicyviolation", (event) => problems.push("blocked: " + event.blockedURI));
</script>"""
# runs after it: uses the page as a reader would, and leaves what it saw in the DOM
ACT = """<script>
(async () => {
  while (document.body.dataset.drawn !== "yes") await new Promise((go) => setTimeout(go, 50));
  const table = document.getElementById("matrices");
  const column = (i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
  const head = table.tHead.rows[0].cells[8];
  const seen = { ratios: [] };
  for (let i = 0; i < 2; i++) {
    head.querySelector("button").focus();
    document.activeElement.click();
    seen.ratios.push([head.getAttribute("aria-sort"), column(8)]);
  }
  table.tHead.rows[0].cells[1].querySelector("button").click();
  seen.layers = column(1);
  const filter = document.getElementById("filter");
  filter.value = "q_proj";
  filter.dispatchEvent(new Event("input"));
  seen.filtered = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
  seen.status = document.getElementById("shown").textContent;
  const charts = [...document.querySelectorAll(".chart")];
  const all = (what) => [...document.querySelectorAll(what)];
  const pause = (ms) => new Promise((go) => setTimeout(go, ms));
  const tip = async (mark) => {
    const box = mark.getBoundingClientRect();
    const at = { bubbles: true, view: window, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
    const kinds = ["pointerover", "mouseover", "pointermove", "mousemove"];
    kinds.forEach((kind) => mark.dispatchEvent(new MouseEvent(kind, at)));
    await pause(50);
    const shown = document.querySelector("#vg-tooltip-element.visible");
    return shown ? shown.textContent : "";
  };
  seen.tooltip = await tip(document.querySelector("#heat-rows .mark-rect.role-mark path"));
  seen.bar = await tip(document.querySelector("#bars-rows .mark-rect.role-mark path"));
  const choose = async (chart, name, value) => {
    const bound = all(`#${chart} .vega-bind`).find((one) => one.textContent.trim().startsWith(name));
    const control = bound.querySelector("select");
    control.focus();
    control.value = value;
    control.dispatchEvent(new Event("change", { bubbles: true }));
    await pause(200);
    return document.activeElement === control;
  };
  const cells = () => all("#heads-rows .mark-rect.role-mark path").length;
  const opacity = (line) => Number(line.getAttribute("stroke-opacity") ?? line.getAttribute("opacity") ?? 1);
  const faint = () => all("#curves-rows .mark-line.role-mark path").filter((line) => opacity(line) < 0.5).length;
  seen.heads = [cells(), await choose("heads-rows", "role", "Keys"), cells()];
  seen.faint = [faint(), await choose("curves-rows", "single out", "Keys"), faint()];
  const bins = () => all("#histograms-rows .mark-rect.role-mark path").length;
  seen.bins = [bins(), await choose("histograms-rows", "layer", "1"), bins()];
  document.querySelector("#pairs thead th:nth-child(7) button").click();
  seen.cosines = all("#pairs tbody tr").map((row) => Number(row.cells[6].textContent));
  seen.reach = all("a[href^='#']").filter((link) => !document.querySelector(link.getAttribute("href"))).length;
  const focusable = "a[href], button, input, select, summary, [tabindex='0']";
  const cut = (box) => box.scrollWidth > box.clientWidth && !box.matches("[tabindex='0']");
  seen.trapped = all(".scroll, .sweep").filter(cut).length;
  const labelled = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby");
  const named = (one) => one.textContent.trim() || one.labels?.length || labelled(one);
  seen.unnamed = all(focusable).filter((one) => !named(one)).length;
  seen.marks = Object.fromEntries(charts.map((chart) => [chart.id, chart.querySelectorAll("svg path").length]));
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.requests = requests.filter((name) => !name.startsWith("data:"));
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.width = innerWidth;
  seen.title = document.title;
  seen.images = document.querySelectorAll("img").length;
  seen.ink = getComputedStyle(document.body).color;
  seen.problems = problems;
  if (parent !== window) return parent.postMessage(JSON.stringify(seen), "*");
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
</script>"""
# no window of the browser is as narrow as a phone, a frame is
PHONE = """<!doctype html><body><pre id="seen"></pre><script>
addEventListener("message", (event) => { document.getElementById("seen").textContent = event.data; });
</script><iframe src="page.html" style="width: 390px; height: 800px; border: 0"></iframe></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI owes a browser: apt-get install chromium")
        pytest.skip("chromium is not installed")
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ScanResult:
    family = FAMILIES["llama"]
    tensors = make_tensors(family) | {HOSTILE: torch.randn(6, 6), "nan.weight": torch.full((3, 3), float("nan"))}
    config = {**family.config, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = write(tmp_path_factory.mktemp("llama"), tensors, config)
    return scan_checkpoint(model, heads=True, options=ScanOptions(detail=True))


@pytest.fixture(scope="module")
def page(result: ScanResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a result beside an older one, in which the queries were others and one name was hostile too."""
    older = [replace(row, pii=row.pii * 0.8) if row.pii and row.role == "Query" else row for row in result.rows]
    older.append(replace(result.rows[0], name=HOSTILE + "older"))
    return result.to_html(compare(ScanResult(older, [], {}), result))


@pytest.fixture(scope="module", params=["desktop", "phone", "dark"])
def seen(
    request: pytest.FixtureRequest, chromium: str, page: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the page showed, and the browser's own log."""
    folder = tmp_path_factory.mktemp(request.param)
    head, _, rest = page.partition("<head>")
    body, _, end = rest.rpartition("</body>")
    page = f"{head}<head>{WATCH}{body}{ACT}</body>{end}"
    (folder / "page.html").write_text(page, "utf-8")
    (folder / "phone.html").write_text(PHONE, "utf-8")
    name, *extra = {
        "desktop": ["page.html", "--window-size=1280,900"],
        "phone": ["phone.html", "--window-size=520,900"],
        "dark": ["page.html", "--window-size=1280,900", "--blink-settings=preferredColorScheme=0"],
    }[request.param]
    line = [chromium, *FLAGS, *extra, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / name).as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    dumped = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert dumped, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(dumped[1]))
    return found | {"log": [text for text in done.stderr.splitlines() if "CONSOLE" in text], "mode": request.param}


def test_nothing_is_fetched_and_nothing_fails(seen: dict[str, Any]) -> None:
    assert seen["requests"] == []
    assert seen["problems"] == []
    assert seen["log"] == []


def test_the_charts_are_drawn(seen: dict[str, Any]) -> None:
    kinds = ("heat", "curves", "heads", "histograms", "bars", "moved")
    assert set(seen["marks"]) == {f"{kind}-{side}" for kind in kinds for side in ("rows", "cols")}
    assert all(count > 3 for count in seen["marks"].values())


def test_a_mark_under_the_pointer_tells_its_numbers(seen: dict[str, Any], result: ScanResult) -> None:
    query = next(row for row in result.rows if (row.layer, row.role, row.vectors) == ("0", "Query", "rows"))
    for text in (query.name, f"{query.pii:.5f}", f"{query.ratio:.3f}"):
        assert text in seen["tooltip"]
    assert "+25.00%" in seen["bar"]


def test_the_controls_of_charts_take_the_keyboard(seen: dict[str, Any]) -> None:
    assert seen["heads"] == [4 * 2, True, 2 * 2]  # four heads of queries, two of keys, in two layers
    before, focused, after = seen["faint"]
    assert (before, focused) == (0, True)
    assert after > 0  # every other role steps back
    whole, focused, one = seen["bins"]
    assert focused
    assert 0 < one < whole


def test_every_table_sorts_on_its_own(seen: dict[str, Any]) -> None:
    assert len(seen["cosines"]) > 10
    assert seen["cosines"] == sorted(seen["cosines"])


def test_links_lead_somewhere_and_what_scrolls_can_be_reached(seen: dict[str, Any]) -> None:
    assert (seen["reach"], seen["trapped"], seen["unnamed"]) == (0, 0, 0)


def test_sorting_works_from_the_keyboard(seen: dict[str, Any], result: ScanResult) -> None:
    (up, first), (down, second) = seen["ratios"]
    assert (up, down) == ("ascending", "descending")
    assert len(first) == len([row for row in result.rows if row.head is None])
    ascending = [float(text) for text in first if text]
    assert ascending == sorted(ascending)
    assert [float(text) for text in second if text] == ascending[::-1]
    assert first[-1] == second[-1] == ""  # what failed stays last
    layers = [int(text) for text in seen["layers"] if text.isdecimal()]
    assert layers == sorted(layers)


def test_the_filter_narrows_the_table(seen: dict[str, Any], result: ScanResult) -> None:
    assert set(seen["filtered"]) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert seen["status"] == f"4 of {len([row for row in result.rows if row.head is None])} shown"


def test_foreign_names_stay_text(seen: dict[str, Any]) -> None:
    assert "owned" not in seen["title"]
    assert seen["images"] == 0


def test_the_page_is_no_wider_than_the_window(seen: dict[str, Any]) -> None:
    assert seen["wide"] <= 0
    assert seen["width"] == (390 if seen["mode"] == "phone" else 1280)


def test_the_dark_page_has_light_ink(seen: dict[str, Any]) -> None:
    red = int(re.findall(r"\d+", seen["ink"])[0])
    assert (red > 180) == (seen["mode"] == "dark")
