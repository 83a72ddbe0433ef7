"""The page in Chromium: choosing by click and by pattern, counting, saving, finishing."""

import re
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from browser import NewPage

from deltaexp.lab import schema
from deltaexp.lab.picker import session
from deltaexp.lab.picker.picking import Picker
from deltaexp.lab.picker.server import Patience, Server

Open = Callable[..., Any]


class Picking:
    """A page with its server, which runs in a thread as it does behind a terminal."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.server, self.folder, self.code = Server(0, Patience(closed=0.5)), folder, -1
        self.thread = threading.Thread(target=self._run, args=(words,))
        self.thread.start()

    def _run(self, words: list[str]) -> None:
        self.code = session.run(self.server, Picker(words, self.folder), opens=False)

    def ended(self) -> int:
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        return self.code


@pytest.fixture
def picking(new_page: NewPage, tmp_path: Path) -> Iterator[Open]:
    """A function that opens the page for a command's words; what it asked for is checked afterwards."""
    running: list[Picking] = []

    def opened(*words: str, **options: Any) -> tuple[Any, Picking]:
        running.append(Picking(list(words), tmp_path / "picked"))
        page = new_page(**options)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(running[-1].server.address)
        page.wait_for_selector("body[data-ready]")
        return page, running[-1]

    asked: list[str] = []
    yield opened
    for one in running:
        one.server.end("closed")
        one.ended()
        assert all(url.startswith((f"http://127.0.0.1:{one.server.port}/", "data:", "blob:")) for url in asked)


def chips(page: Any) -> list[str]:
    return page.locator("#chips code").all_inner_texts()


def row(page: Any, name: str, kind: str = "Linear", nth: int = 0) -> Any:
    own = page.locator(".name").get_by_text(re.compile(f"^{re.escape(name)}$"))
    return page.locator(".row").filter(has=own).filter(has_text=kind).nth(nth)


def settled(page: Any) -> None:
    """Wait until what was asked last is answered."""
    page.wait_for_selector("#trainable:not(.busy)", state="attached")


def local(folder: Path, config: Any, architecture: str) -> list[str]:
    """Return the words for a backbone of which there is no more than a config."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return ["backbone=local", f"backbone.source={folder}", "backbone.name=mine"]


def test_choose_count_save_and_finish(picking: Open, capsys: pytest.CaptureFixture[str]) -> None:
    page, one = picking("lora_r=4")
    assert page.url == f"http://127.0.0.1:{one.server.port}/"  # without the token
    assert page.inner_text("#trainable") == "8,192 trainable"
    assert chips(page) == ["attn.q", "attn.v"]
    assert page.locator(".row[aria-checked=true]").count() == 8

    row(page, "k").locator(".tag").click()  # the common name: everywhere
    settled(page)
    assert chips(page) == ["attn.q", "attn.k", "attn.v"]
    assert page.inner_text("#trainable") == "12,288 trainable"
    row(page, "k").click()  # in this block only
    settled(page)
    assert page.inner_text("#trainable") == "11,264 trainable"
    assert row(page, "k").get_attribute("aria-checked") == "false"
    assert row(page, "k", nth=1).get_attribute("aria-checked") == "true"
    page.click("#undo")
    settled(page)
    assert chips(page) == ["attn.q", "attn.k", "attn.v"]
    other = page.locator("#ways button").first
    assert other.count() == 0

    page.fill("#key-lora_r", "2")
    page.press("#key-lora_r", "Tab")
    settled(page)
    assert page.inner_text("#trainable") == "6,144 trainable"
    page.fill("#key-lora_r", "0")
    page.press("#key-lora_r", "Tab")
    settled(page)
    assert page.inner_text("#error") == "lora_r is 0; it must be at least 1."
    assert page.locator("#done-wide").is_disabled()
    page.fill("#key-lora_r", "2")
    page.press("#key-lora_r", "Tab")
    settled(page)

    page.fill("#file", "mine")
    page.click("#save")
    page.wait_for_selector("#saved:has-text('Saved')")
    saved = one.folder / "experiment" / "mine.yaml"
    assert "modified_modules: [attn.q, attn.k, attn.v]" in saved.read_text()
    page.click("#save")
    page.wait_for_selector("#saved:has-text('There is already')")
    page.click("#keep")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "mine.yaml"
    assert Path(download.value.path()).read_text() == saved.read_text()

    override, command = page.inner_text("#override"), page.inner_text("#command")
    assert override == "'modified_modules=[attn.q,attn.k,attn.v]'"
    page.click("#done-wide")
    page.wait_for_selector("#over:has-text('Done.')")
    assert override in page.inner_text("#over")
    assert one.ended() == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [override, command]
    assert f"saved {saved}" in said.err
    assert schema.composed(["experiment=mine"], [str(one.folder)]) == schema.composed(shlex.split(command)[3:])


@pytest.mark.slow
def test_patterns_are_previewed_as_the_engine_reads_them(picking: Open) -> None:
    page, _ = picking()

    def said(pattern: str, text: str) -> None:
        page.fill("#pattern", pattern)
        page.wait_for_selector(f"#said:has-text({text!r})")

    said("wo", "matches 4 modules, read as the end of a name")
    assert page.locator(".row.hit").count() == 4
    said("ff.w2", "matches 4 modules, read as a common name")
    said(r"[r]encoder\.block\.1\..*\.(q|k)", "matches 2 modules, read as a regular expression")
    assert page.locator(".row.hit").count() == 2
    said("[r]q(", "is not a regular expression")
    assert page.locator(".row.hit").count() == 0
    assert page.locator("#add").is_disabled()
    said("wi_3", "The nearest names are")
    said(r"[r]encoder\.block\.1\..*\.(q|k)", "matches 2 modules")
    page.press("#pattern", "Enter")
    page.wait_for_selector("#chips li:nth-child(3)")
    settled(page)
    assert chips(page) == ["attn.q", "attn.v", r"[r]encoder\.block\.1\..*\.(q|k)"]
    assert page.inner_text("#override") == r"""'modified_modules=[attn.q,attn.v,'"'"'[r]encoder\.block\.1\..*\.(q|k)'"'"']'"""
    # What cannot carry the delta is said at its row, and goes again.
    row(page, "SelfAttention", "T5Attention").click()
    settled(page)
    assert "is a T5Attention" in page.locator(".row .fault").first.inner_text()
    assert page.locator("#done-wide").is_disabled()
    page.click("#reset")
    settled(page)
    assert page.locator(".fault").count() == 0
    assert chips(page) == ["attn.q", "attn.v"]


@pytest.mark.slow
def test_by_keyboard_on_folded_blocks(picking: Open, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=32, vocab_size=99)
    page, _ = picking(*local(tmp_path / "llama", config, "LlamaForCausalLM"), "task=e2e_nlg", "delta_type=adapter")
    assert page.locator(".row").count() == 18
    page.fill("#search", "layers.7.self_attn.o")
    assert page.locator(".row").last.inner_text().startswith("o_proj")
    assert page.locator(".row").count() == 6  # with what is above it
    page.fill("#search", "nothing at all")
    assert page.locator("#empty").is_visible()
    page.fill("#search", "")
    page.click("#clear")
    settled(page)
    assert "nothing would be modified" in page.inner_text("#error")

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    focused = page.locator(".row:focus .name")
    page.locator(".row").first.focus()
    press("ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight")
    assert focused.inner_text() == "0–31"
    press("u")
    assert focused.inner_text() == "0"
    assert page.locator(".row").count() == 18 - 11 + 31
    press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown")
    assert focused.inner_text() == "o_proj"
    press(" ")
    settled(page)
    assert chips(page) == ["layers.0.self_attn.o_proj"]
    press("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft", "u")
    assert focused.inner_text() == "0–31"
    mixed = page.locator(".row[aria-checked=mixed]")
    assert mixed.locator(".name").all_inner_texts() == ["o_proj"]
    mixed.click()
    settled(page)
    assert chips(page) == ["attn.proj"]
    assert page.locator(".row[aria-checked=true]").count() == 1
    press("ArrowUp", "e")  # everywhere
    settled(page)
    assert chips(page) == ["attn.v", "attn.proj"]


@pytest.mark.slow
def test_pairs_and_slices(picking: Open, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=32, bos_token_id=1, eos_token_id=1)
    page, _ = picking(*local(tmp_path / "gpt2", config, "GPT2LMHeadModel"), "task=e2e_nlg")
    slices = page.locator(".row").filter(has_text="slice")
    assert [one.get_attribute("aria-checked") for one in slices.all()] == ["true", "false", "true"]
    row(page, "c_attn", "Conv1D").locator(".box").click()
    settled(page)
    assert chips(page) == ["c_attn"]
    page.select_option("#type", "parallel_adapter")
    settled(page)
    assert chips(page) == ["attn", "ff.w1"]
    page.locator("#chips button").first.click()
    settled(page)
    assert "Choose as many of both." in page.inner_text("#error")
    page.click("#sides button[data-side='1']")
    assert chips(page) == ["attn", "ff.w2"]
    row(page, "attn", "GPT2Attention").click()
    settled(page)
    assert page.inner_text("#override") == "'modified_modules=[ff.w1,ff.w2]'"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(scheme: str, picking: Open, tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    words = [*local(tmp_path / "bert", config, "BertModel"), "task=rte"]
    page, one = picking(*words, width=390, height=844, color_scheme=scheme, has_touch=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    assert page.inner_text("#foot-count") == "74,498"
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 20, 24)"}[scheme]
    row(page, "key").tap()
    settled(page)
    assert page.inner_text("#foot-count") == "111,362"
    page.select_option("#type", "soft_prompt")
    settled(page)
    assert "goes on the whole backbone" in page.inner_text("#chips")
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    page.goto("about:blank")  # closes it
    assert one.ended() == 1
