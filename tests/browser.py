"""Chromium for tests of pages; they are skipped, with the reason, where it or Playwright is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
"""A browser that runs as root in a container, and reaches for nothing by itself."""
NewPage = Callable[..., "Page"]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser, started once for all tests of a process."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Browser) -> Iterator[NewPage]:
    """A function that opens an empty page with a fresh profile; the test fails if any of its pages reports an error.

    Its arguments are those of Playwright's ``new_context``, such as ``color_scheme="dark"``, and

    - ``width``, ``height``: of the window in CSS pixels.
    - ``network``: whether anything but files and the page itself may be fetched; what is asked for in vain is an error.
    """
    contexts, faults = [], []

    def opened(*, width: int = 1280, height: int = 900, network: bool = True, **options: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        if not network:
            context.set_offline(True)
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(f"could not fetch {request.url}"))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults
