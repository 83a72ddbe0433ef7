"""Tables, the targets that the figures are held against, and the plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from measure import DTYPES
from rich.console import Console
from rich.table import Table


def show(console: Console, shape: str, group: str, found: dict[str, Any], peaks: dict[str, float]) -> None:
    """Print the figures of one group."""
    for name, error in found["failed"].items():
        console.print(f"  {name} could not be measured: {error}", style="yellow", highlight=False)
    if not found["contenders"]:
        return
    base = found["contenders"][found["against"]]
    peak = peaks[DTYPES[base["precision"]]]
    achieved = found["flops"] / base["seconds"]["median"]
    rounds, graphs = len(base["times"]), ", as CUDA graphs" if found["graphs"] else ""
    table = Table(
        title=f"{shape}: {group}{graphs} ({rounds} rounds; {found['against']}: {found['flops'] / 1e9:.1f} GFLOP, "
        f"{achieved / 1e9:.0f} GFLOP/s, {achieved / peak:.0%} of the peak {peak / 1e9:.0f})",
        title_justify="left",
    )
    columns = ["contender", "ms", "quartiles", "ratio", "quartiles", "of minima"]
    columns += ["saved MB", "trained"] if found["training"] else []
    gpu = "floor_seconds" in found
    columns += ["peak MB", "GFLOP", "of peak"] if gpu else []
    for column in columns:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, one in found["contenders"].items():
        took, ratio = one["seconds"], one["ratio"]
        row = [
            name,
            f"{1e3 * took['median']:.2f}",
            f"{1e3 * took['q1']:.2f} - {1e3 * took['q3']:.2f}",
            f"{ratio['median']:.3f}",
            f"{ratio['q1']:.3f} - {ratio['q3']:.3f}",
            f"{took['min'] / base['seconds']['min']:.3f}",
        ]
        if found["training"]:
            row += [f"{one['saved_bytes'] / 1e6:.2f}", f"{one['trained_parameters']:,}"]
        if gpu:
            known = "flops" in one
            row += [f"{one['peak_bytes'] / 1e6:.0f}", f"{one['flops'] / 1e9:.1f}", f"{one['of_peak']:.1%}"] if known else []
        table.add_row(*row, style="bold" if one["library"] == "deltaexp" else None)
    console.print(table)
    if gpu:
        floor, took = found["floor_seconds"], base["seconds"]["median"]
        console.print(
            f"  Arithmetic floor, the FLOP of the {found['against']} at the measured peak: {1e3 * floor:.3f} ms; "
            f"the {found['against']} takes {took / floor:.2f} times as long.\n",
            highlight=False,
        )


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is to be reached, each with the figure that was measured."""
    lines: list[dict[str, Any]] = []

    def hold(what: str, value: float | None, most: float) -> None:
        if value is not None:
            met = value <= most
            lines.append(
                {"text": f"{'met' if met else 'NOT met'}: {what}: {value:.3f} (at most {most})", "value": value, "met": met}
            )

    for shape, groups in results["shapes"].items():
        fp32 = groups.get("training, fp32", {}).get("contenders", {})
        for kind, most in (("q,v", 1.02), ("all", 1.15 if shape == "minilm" else 1.10)):
            found = _best(fp32, f"lora {kind}", "deltaexp", exact=f"LoRA {kind}")
            hold(f"{shape}: LoRA {kind} against the frozen limit", found and found["ratio"]["median"], most)
        low = groups.get("training, bf16", {}).get("contenders", {})
        for kind in ("q,v", "all"):
            theirs, mine = _best(low, f"lora {kind}", "peft"), _best(low, f"lora {kind}", "deltaexp")
            if theirs and mine:
                most = 0.667 if shape == "minilm" else 1.0
                hold(f"{shape}: bf16 LoRA {kind} against PEFT's best bf16 setting", _of(mine, theirs), most)
        default, auto = low.get("PEFT LoRA all: its default, fp32"), low.get("LoRA all: speed=auto")
        if default and auto:
            hold(f"{shape}: speed=auto, LoRA all, against PEFT's default", _of(auto, default), 0.4)
        for group in (fp32, groups.get("methods, fp32", {}).get("contenders", {})):
            for method in dict.fromkeys(one["method"] for one in group.values()):
                theirs, mine = _best(group, method, "peft"), _best(group, method, "deltaexp")
                if theirs and mine:
                    hold(f"{shape}: {method} against PEFT", _of(mine, theirs), 1.0)
                    value = mine["saved_bytes"] / max(theirs["saved_bytes"], 1)
                    hold(f"{shape}: {method}, saved bytes against PEFT", value, 1.0)
        for name, one in groups.items():
            if name.startswith("inference"):
                for method, most in (("unmerged", 1.08), ("mixed", 1.12), ("merged", 1.03)):
                    found = _best(one["contenders"], method, "deltaexp")
                    hold(f"{shape}: {name}, {method} against the backbone", found and found["ratio"]["median"], most)
    return lines


def _of(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the median of the ratios of two contenders' times, round by round."""
    return statistics.median(a / b for a, b in zip(one["times"], other["times"], strict=True))


def _best(contenders: dict[str, Any], method: str, library: str, exact: str | None = None) -> Any:
    """Return the fastest contender of a library for a method, or the one that is called so."""
    found = [
        one
        for name, one in contenders.items()
        if one["method"] == method and one["library"] == library and exact in (None, name)
    ]
    return min(found, key=lambda one: one["seconds"]["median"], default=None)


def plot(results: dict[str, Any], target: Path) -> None:
    """Draw the ratios of all groups; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(shape, name, one) for shape, groups in results["shapes"].items() for name, one in groups.items()]
    parts = [part for part in found if part[2]["contenders"]]
    if not parts:
        return
    heights = [len(one["contenders"]) + 2 for _, _, one in parts]
    figure, axes = pyplot.subplots(
        len(parts), 1, figsize=(9, 0.24 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    colours = {"torch": "#999999", "peft": "#d98c3f", "deltaexp": "#2f6fb0"}
    for axis, (shape, name, one) in zip(axes[:, 0], parts, strict=True):
        names = list(one["contenders"])
        ratios = [found["ratio"] for found in one["contenders"].values()]
        middle = [ratio["median"] for ratio in ratios]
        spread = [[ratio["median"] - ratio["q1"] for ratio in ratios], [ratio["q3"] - ratio["median"] for ratio in ratios]]
        fill = [colours[found["library"]] for found in one["contenders"].values()]
        axis.barh(names, middle, xerr=spread, color=fill, error_kw={"lw": 0.8})
        axis.axvline(1, color="black", lw=0.8)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_title(f"{shape}: {name}, time as a multiple of {one['against']}", fontsize=8, loc="left")
        for spine in ("top", "right"):
            axis.spines[spine].set_visible(False)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
