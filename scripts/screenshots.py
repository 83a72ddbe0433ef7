"""Make the pictures of deltaexp's pages that the documentation shows: ``python scripts/screenshots.py [FOLDER]``.

FOLDER is that of a sweep; the report on it is written there first. Without it only the page for choosing modules is pictured.
Needs ``pip install playwright`` and Debian's chromium.
"""

import argparse
import io
import shutil
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from transformers import LlamaConfig

from deltaexp.lab import report
from deltaexp.lab.picker import session
from deltaexp.lab.picker.picking import Picker
from deltaexp.lab.picker.server import Server

TARGET = Path(__file__).resolve().parents[1] / "deltaexp" / "assets" / "screenshots"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]


def opened(browser: Browser, address: str, width: int, height: int, scheme: str = "light") -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    page.goto(address)
    return page


def save(page: Page, name: str) -> None:
    """Save what is seen of a page."""
    page.wait_for_timeout(500)
    path = TARGET / f"{name}.png"
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # A palette that keeps the small coloured marks as they are, for a third of the bytes.
    picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
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


def of_picker(browser: Browser, folder: Path) -> None:
    """Choose modules of a Llama of 32 blocks, of which there is only the config."""
    LlamaConfig(num_hidden_layers=32, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "llama")
    words = ["backbone=local", f"backbone.source={folder / 'llama'}", "backbone.name=llama", "task=gsm8k"]
    for name, width, height, scheme in (("picker", 1200, 860, "light"), ("picker-phone", 360, 740, "dark")):
        server, picker = Server(), Picker(words, folder)
        thread = threading.Thread(target=session.run, args=(server, picker, False))
        thread.start()
        page = opened(browser, server.address, width, height, scheme)
        page.wait_for_selector("body[data-ready]")
        page.locator(".fold").click()
        for key in ("ArrowRight", "ArrowRight"):  # open the first block, and its attention
            page.keyboard.press(key)
            page.keyboard.press("ArrowRight")
        page.locator(".row").filter(has_text="o_proj").first.locator(".tag").click()
        page.mouse.move(0, 0)
        page.wait_for_selector("#chips li:nth-child(3)")
        page.fill("#pattern", r"[r]layers\.[0-3]\.mlp\..*_proj")
        page.wait_for_selector("#said:has-text('matches')")
        page.evaluate("() => scrollTo(0, 0)")
        save(page, name)
        server.end("closed")
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the folder of a sweep")
    folder = parser.parse_args().folder
    TARGET.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium")
    if program is None:
        parser.error("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        if folder is not None:
            of_report(browser, folder)
        with tempfile.TemporaryDirectory() as scratch:
            of_picker(browser, Path(scratch))
        browser.close()


if __name__ == "__main__":
    main()
