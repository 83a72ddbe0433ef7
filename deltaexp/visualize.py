"""Seeing a model: its module tree with repeated blocks folded, and what of it is frozen, trainable or delta."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

import torch
from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch import nn

from deltaexp.lazy import Layer

# OpenDelta's legend: the name of a module in grey, trainable parameters in green, frozen ones in blue, deltas in orange.
STYLES = {"trainable": "green", "frozen": "blue", "delta": "bold dark_orange", "module": "bright_black"}


class Visualization:
    """Shows the structure of a model, deltas included.

    Args:
        backbone_model: Any torch module.
    """

    def __init__(self, backbone_model: nn.Module) -> None:
        self.model = backbone_model

    def structure_graph(self, console: Console | None = None, fold: bool = True) -> Tree:
        """Print the module tree and return it.

        Args:
            console: Where to print; standard output where none is given.
            fold: Show equal blocks that follow one another once, e.g. as ``0-11``.
        """
        tree = self._tree(fold)
        _print(tree, console or Console())
        return tree

    def to_html(self, fold: bool = True, width: int = 120) -> str:
        """Return the module tree as a piece of HTML that carries its own colours, for notebooks and model cards.

        Args:
            fold: As for `structure_graph`.
            width: Columns of text.
        """
        page = '<pre style="line-height:1.2;font-family:monospace">{code}</pre>'
        return self._recorded(fold, width).export_html(inline_styles=True, code_format=page)

    def to_svg(self, fold: bool = True, width: int = 120, title: str = "") -> str:
        """Return the module tree as an SVG image; ``title`` stands above it, the model's class where there is none."""
        return self._recorded(fold, width).export_svg(title=title or type(self.model).__name__)

    def _repr_html_(self) -> str:
        """Let a notebook show the tree of a `Visualization` that ends a cell."""
        return self.to_html()

    def _recorded(self, fold: bool, width: int) -> Console:
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        _print(self._tree(fold), console)
        return console

    def _tree(self, fold: bool) -> Tree:
        tree = Tree(Text.assemble(("root", "bold"), " ", _kind(self.model), _summary(self.model)), guide_style="bright_black")
        self._grow(tree, self.model, fold)
        return tree

    def print_counts(self, counts: Mapping[str, int], console: Console | None = None) -> None:
        """Print numbers of parameters, what part of the backbone they are, and memory.

        Args:
            counts: What `DeltaModel.counts` returns.
            console: Where to print; standard output where none is given.
        """
        total = max(counts["backbone"], 1)
        parts = [f"{name} {counts[name]:,} ({counts[name] / total:.3%})" for name in ("trainable", "delta")]
        bytes_of = sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())
        parts.append(f"parameters take {bytes_of / 2**20:,.1f} MiB")
        if torch.cuda.is_available():
            parts.append(f"peak CUDA memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
        (console or Console()).print(f"backbone {counts['backbone']:,} parameters; " + "; ".join(parts), highlight=False)

    def _grow(self, tree: Tree, module: nn.Module, fold: bool) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            tree.add(_parameter(name, parameter, isinstance(module, Layer) or tree.style == STYLES["delta"]))
        for names in folded(module, fold):
            child = getattr(module, names[0])
            label = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
            delta = isinstance(child, Layer) or tree.style == STYLES["delta"]
            text = Text.assemble((label, STYLES["delta"] if delta else STYLES["module"]), " ", _kind(child))
            branch = tree.add(text.append_text(_summary(child)), style=STYLES["delta"] if delta else "")
            self._grow(branch, child, fold)


def folded(module: nn.Module, fold: bool = True) -> Iterator[list[str]]:
    """Yield the names of a module's children that have parameters, equal numbered ones that follow one another together.

    Modules without parameters (dropout, activations) tell nothing about a delta.
    """
    group: list[str] = []
    before = None
    for name, child in module.named_children():
        if not any(True for _ in child.parameters()):
            continue
        mine = _fingerprint(child) if fold and name.isdigit() else None
        if group and (mine is None or mine != before):
            yield group
            group = []
        group.append(name)
        before = mine
    if group:
        yield group


def _print(tree: Tree, console: Console) -> None:
    """Print a tree and OpenDelta's legend below it."""
    console.print(tree)
    legend = Text(" ").join(Text(name, style) for name, style in STYLES.items())
    console.print(Text("legend: ").append_text(legend))


def _kind(module: nn.Module) -> Text:
    return Text(f"({type(module).__name__})", "cyan")


def _parameter(name: str, parameter: nn.Parameter, delta: bool) -> Text:
    style = STYLES["delta"] if delta else STYLES["trainable" if parameter.requires_grad else "frozen"]
    shape = ",".join(map(str, parameter.shape))
    frozen = "" if parameter.requires_grad else " frozen"
    return Text.assemble((f"{name}:[{shape}]{frozen}", style))


def _summary(module: nn.Module) -> Text:
    """Return the number of parameters below a module, and how many of them are trainable."""
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Text(f" {total:,}" + (f", {trainable:,} trainable" if 0 < trainable < total else ""), "dim") if total else Text()


def _fingerprint(module: nn.Module) -> tuple:
    """Return what two blocks must have in common to be shown once: their trees, shapes and what is trainable."""
    modules = tuple((name, type(child).__name__) for name, child in module.named_modules())
    parameters = tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
    return modules, parameters
