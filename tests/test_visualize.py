"""The picture of a model: every block once, and what of it is frozen, trainable or delta."""

from __future__ import annotations

import io

import pytest
from models import FAMILIES, attach
from rich.console import Console
from torch import nn

from deltaexp import Visualization
from deltaexp.visualize import STYLES


def drawn(backbone: nn.Module, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=160)
    Visualization(backbone).structure_graph(console=console, **options)
    return console.file.getvalue()


def test_equal_blocks_are_folded() -> None:
    backbone = FAMILIES["bert"].build()
    folded, whole = drawn(backbone), drawn(backbone, fold=False)
    assert "0-1 (BertLayer)" in folded
    assert folded.count("query (Linear)") == 1
    assert "0-1" not in whole
    assert whole.count("query (Linear)") == 2
    assert "root (BertForSequenceClassification)" in folded
    assert "weight:[3,16]" in folded
    assert "legend: trainable frozen delta module" in folded
    assert "dropout" not in folded


def test_blocks_with_different_deltas_are_kept_apart() -> None:
    backbone = FAMILIES["bert"].build()
    attach(backbone, modified_modules=["0.attention.self.query"])
    text = drawn(backbone)
    assert "0-1" not in text
    assert text.count("lora (LoraLayer)") == 1
    assert "lora_A:[8,16]" in text
    assert "lora_B:[16,8]" in text


def test_what_is_trainable() -> None:
    backbone = FAMILIES["bert"].build()
    assert "frozen" not in drawn(backbone).replace("legend: trainable frozen", "")
    attach(backbone, unfrozen_modules=["deltas", "classifier"])
    text = drawn(backbone)
    assert "weight:[32,16] frozen" in text
    assert "weight:[3,16]\n" in text
    assert "lora_A:[8,16]\n" in text
    assert f"classifier (Linear) {3 * 16 + 3}\n" in text
    assert "query (Linear) 528, 256 trainable" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_styles(name: str) -> None:
    backbone = FAMILIES[name].build()
    attach(backbone, "adapter")
    tree = Visualization(backbone).structure_graph(console=Console(file=io.StringIO()))
    styles: dict[str, set[str]] = {}

    def walk(branch, inside: bool) -> None:
        for child in branch.children:
            text = child.label
            delta = inside or "(AdapterLayer)" in text.plain
            styles.setdefault("delta" if delta else "backbone", set()).add(str(text.spans[0].style))
            walk(child, delta)

    walk(tree, False)
    assert styles == {"delta": {STYLES["delta"]}, "backbone": {STYLES["module"], STYLES["frozen"]}}


def test_counts() -> None:
    console = Console(file=io.StringIO(), width=160)
    view = Visualization(FAMILIES["bert"].build())
    view.print_counts({"backbone": 4000, "trainable": 100, "delta": 50}, console)
    assert console.file.getvalue().startswith("backbone 4,000 parameters; trainable 100 (2.500%); delta 50 (1.250%)")


def test_it_changes_nothing() -> None:
    backbone = FAMILIES["bert"].build()
    before = [(name, type(module)) for name, module in backbone.named_modules()]
    drawn(backbone)
    assert [(name, type(module)) for name, module in backbone.named_modules()] == before


def test_html_and_svg_show_the_same_in_colours() -> None:
    backbone = FAMILIES["bert"].build()
    attach(backbone)
    view = Visualization(backbone)
    lines = [line.strip(" │├└─") for line in drawn(backbone).splitlines() if "lora_A" in line]
    html, svg = view.to_html(), view.to_svg(title="mine")
    assert view._repr_html_() == html
    assert html.startswith("<pre")
    assert "color: #ff8700" in html  # OpenDelta's orange
    assert "<svg" in svg
    assert "mine" in svg
    for line in lines:
        assert line in html
        assert line.replace(" ", "&#160;") in svg
    assert html.count("BertLayer") == 1
    assert view.to_html(fold=False).count("BertLayer") == 2
