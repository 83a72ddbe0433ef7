"""Make the pictures of deltaexp's pages that the documentation shows: ``python scripts/screenshots.py FOLDER``.

FOLDER is that of a sweep; the report on it is written there first. Needs ``pip install playwright`` and Debian's chromium.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from deltaexp.lab import report

TARGET = Path(__file__).resolve().parents[1] / "deltaexp" / "assets" / "screenshots"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]
COLOURS = 128
"""Of a picture: enough for pages with a few plain colours, and a quarter of the bytes."""


def opened(browser: Browser, address: str, width: int, height: int, scheme: str = "light") -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    page.goto(address)
    return page


def save(page: Page, name: str) -> None:
    """Save what is seen of a page."""
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = TARGET / f"{name}.png"
    picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def of_report(browser: Browser, folder: Path) -> None:
    address = report.write(folder).resolve().as_uri()
    for name, scheme in (("report", "light"), ("report-dark", "dark")):
        page = opened(browser, address, 1200, 1180, scheme)
        page.locator(".board h2").first.evaluate("one => one.scrollIntoView()")
        page.evaluate("document.querySelector('.filters').style.position = 'static'")
        page.locator(".board h2").first.evaluate(
            "one => { window.scrollTo(0, one.getBoundingClientRect().top + scrollY - 24) }"
        )
        save(page, name)
    page = opened(browser, address, 1200, 900)
    page.locator(".leaderboard a.run").first.click()
    save(page, "report-run")
    page = opened(browser, address, 360, 740)
    page.locator(".board h2").first.evaluate("one => one.scrollIntoView()")
    save(page, "report-phone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of a sweep")
    folder = parser.parse_args().folder
    TARGET.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium")
    if program is None:
        parser.error("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        of_report(browser, folder)
        browser.close()


if __name__ == "__main__":
    main()
