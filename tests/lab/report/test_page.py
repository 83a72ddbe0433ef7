"""The page, as a browser has it: without network, by mouse and keyboard, at every width, light and dark."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import studies
from rich.console import Console

from deltaexp.lab import report
from deltaexp.lab.report import page as pages

HOSTILE = "</script><script>window.hurt=1</script><img src=x onerror=window.hurt=1>"


@pytest.fixture(scope="module")
def page(real_run: Path, study: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with two tasks, a method by any name, and a run that failed."""
    folder = tmp_path_factory.mktemp("page") / "study"
    shutil.copytree(study, folder)
    for number, kind in enumerate(("lora", "adapter")):
        studies.grown(real_run, folder / f"other-{number}", kind, 1, range(20 + 9 * number), config={"task.name": "other"})
    studies.grown(real_run, folder / "hostile", "lora", 1, range(30), config={"task.name": "other", "lora_r": HOSTILE})
    job = {"folder": "failed", "identity": "a", "overrides": {}, "status": "failed", "error": HOSTILE, "seconds": 1.0}
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "command": "deltaexp -m", "overrides": [], "jobs": [job]}))
    return report.write(folder, Console(file=io.StringIO())).as_uri()


def test_json_cannot_end_its_script() -> None:
    text = str(pages.embedded({"a": "</script><!--&\u2028\u2029"}))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"a": "</script><!--&\u2028\u2029"}


def test_the_page_needs_nothing_else(page: str) -> None:
    """Nothing but its own runs is linked, and all markup is its own."""
    text = Path(page.removeprefix("file://")).read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!data:|#|[\w.-]+/")', own)
    assert "<img" not in own
    assert len(text) < 2_000_000


def visible(tab: Any, selector: str) -> list[str]:
    """Return the texts of what is shown."""
    return [one.inner_text().strip() for one in tab.locator(selector).all() if one.is_visible()]


def column(tab: Any, number: int) -> list[str]:
    """Return a column of the second board's leaderboard."""
    return visible(tab, f".board:nth-of-type(3) .leaderboard tbody tr > :nth-child({number})")


def names(tab: Any) -> list[str]:
    """Return the methods of the board of the study."""
    return [text.split("\n")[0].split(" ")[0] for text in column(tab, 1)]


def charts(tab: Any) -> list[Any]:
    """Return the charts, which are drawn when one comes to them."""
    found = tab.locator(".board .chart").all()
    for chart in found:
        chart.scroll_into_view_if_needed()
        chart.locator(".xtitle").wait_for()
    return found


def test_it_works_without_network(page: str, new_page: Callable[..., Any]) -> None:
    tab = new_page(network=False)
    tab.goto(page)
    assert visible(tab, ".board h2") == ["other with small", "t with small"]
    assert names(tab) == ["full", "lora", "adapter", "bitfit", "none"]
    assert "Not separable from it: full, adapter." in tab.locator(".board .answer").nth(1).inner_text()
    for chart in charts(tab):
        assert chart.locator(".xtitle").is_visible()
    # Both baselines are drawn into the scores.
    drawn = tab.locator(".board").nth(1).locator("[data-chart=scores] .annotation-text").all_text_contents()
    assert sorted(drawn) == ["full", "none"]
    assert tab.evaluate("window.hurt") is None
    assert HOSTILE in tab.locator("#aside").inner_text()


@pytest.mark.slow
def test_filters(page: str, new_page: Callable[..., Any]) -> None:
    tab = new_page()
    tab.goto(page)
    assert tab.locator("#count").inner_text() == "8 of 8 methods"
    tab.select_option("#task", "t")
    assert visible(tab, ".board h2") == ["t with small"]
    tab.fill("#text", "a")
    assert names(tab) == ["lora", "adapter"]
    tab.fill("#text", "")
    tab.select_option("#type", "bitfit")
    assert names(tab) == ["bitfit"]
    assert tab.locator("#count").inner_text() == "1 of 8 methods"
    tab.select_option("#type", "")
    tab.select_option("#task", "other")
    tab.check("#best")
    assert len(visible(tab, ".board .leaderboard tbody tr")) == 2
    tab.fill("#text", "no such")
    assert tab.locator("#nothing").is_visible()


@pytest.mark.slow
def test_sorting_by_mouse_and_keyboard(page: str, new_page: Callable[..., Any]) -> None:
    tab = new_page()
    tab.goto(page)
    heads = tab.locator(".board").nth(1).locator(".leaderboard th[aria-sort]")
    head = heads.filter(has_text="trainable")
    head.locator("button").click()
    assert names(tab) == ["full", "adapter", "lora", "bitfit", "none"]
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    assert names(tab) == ["none", "bitfit", "lora", "adapter", "full"]
    assert head.get_attribute("aria-sort") == "ascending"
    heads.nth(0).locator("button").click()
    assert names(tab) == ["adapter", "bitfit", "full", "lora", "none"]
    assert head.get_attribute("aria-sort") == "none"
    heads.filter(has_text="sd").locator("button").click()
    assert names(tab)[-2:] == ["full", "none"]  # what is not known comes last, whichever way


@pytest.mark.slow
def test_every_number_leads_to_its_run(page: str, study: Path, new_page: Callable[..., Any]) -> None:
    tab = new_page()
    tab.goto(page)
    tab.locator(".board").nth(1).get_by_role("button", name="bitfit").first.click()
    pane = tab.locator("#pane")
    assert pane.get_by_role("row").count() == 4
    pane.get_by_role("link", name="bitfit-2").click()
    text = pane.inner_text()
    results = json.loads((study / "bitfit-2" / "delta" / "results.json").read_text())
    assert results["digests"]["delta_model.safetensors"] in text
    assert "python -m deltaexp task=sst2" in text
    assert "AutoDeltaModel.from_finetuned" in text
    pane.get_by_text("Config", exact=True).click()
    assert "task.name: t" in pane.inner_text()
    tab.keyboard.press("Escape")
    assert not pane.is_visible()
    tab.locator(".board").nth(1).locator("a.run").first.click()
    assert "full-1" in pane.inner_text()
    tab.goto(page + "#run/0")
    tab.reload()
    assert pane.is_visible()


@pytest.mark.slow
def test_pairs_against_one(page: str, new_page: Callable[..., Any]) -> None:
    tab = new_page()
    tab.goto(page)
    board = tab.locator(".board").nth(1)
    board.locator("summary").click()
    board.locator(".pairs tbody tr").first.wait_for()  # a browser opens it in its own time
    assert len(visible(tab, ".board:nth-of-type(3) .pairs tbody tr")) == 10
    board.locator(".against").select_option("lora · lora_r=8")
    rows = visible(tab, ".board:nth-of-type(3) .pairs tbody tr")
    assert len(rows) == 4
    assert any("not separable" in row and "adapter" in row for row in rows)
    assert any("lora · lora_r=8 is better" in row and "bitfit" in row for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(page: str, scheme: str, new_page: Callable[..., Any]) -> None:
    """Nothing but the tables themselves is wider than the page, and text stands out from its ground."""
    tab = new_page(width=360, height=740, color_scheme=scheme)
    tab.goto(page)
    assert len(charts(tab)) == 6
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    ground, ink = (tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink))
    assert (light > 700 and dark < 150) if scheme == "light" else (light < 100 and dark > 600)
    # The charts, too, take the colours of the scheme.
    label = tab.locator(".board .chart .xtick text").first.evaluate("one => getComputedStyle(one).fill")
    assert label == tab.evaluate("getComputedStyle(document.querySelector('.note')).color")
    tab.locator(".board .leaderboard button[data-method]").first.click()
    box = tab.locator("#pane").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
