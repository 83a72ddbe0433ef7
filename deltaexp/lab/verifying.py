"""Verifying a saved delta, by its run or from the command line: files, tensors and hashes, and with its backbone the model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from deltaexp import checkpoint, hub, interop, verification
from deltaexp import probe as probes
from deltaexp.auto import AutoDeltaConfig, AutoDeltaModel
from deltaexp.checkpoint import SavedDelta
from deltaexp.errors import DeltaExpError
from deltaexp.lab import backbones
from deltaexp.lab.config import RunConfig
from deltaexp.manifest import MANIFEST
from deltaexp.model import DeltaModel
from deltaexp.verification import Check, HashCheck

ROWS = 4
"""Rows of the batch on which the delta that was saved is compared with the one that was trained."""
TOLERANCE = 1e-5
"""Largest difference of a logit that the reloaded delta may show; on the CPU there is none."""


def loads_again(
    trained: DeltaModel, folder: Path, batch: Mapping[str, Any], untouched: AbstractContextManager[nn.Module]
) -> dict[str, Any]:
    """Load a delta that a run has saved into an untouched backbone and compare its logits with the trained model's.

    Args:
        trained: The trained delta, in its backbone.
        folder: Where it was saved.
        batch: What the model is given, on its device.
        untouched: Yields the backbone.

    Raises:
        DeltaExpError: If they differ by more than the tolerance.
    """

    @torch.inference_mode()
    def logits(model: Any) -> torch.Tensor:
        return probes.logits(model.eval()(**batch)).float()

    expected, state = logits(trained.backbone_model), torch.get_rng_state()
    with untouched as fresh:
        loaded = AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
        torch.set_rng_state(state)
        difference = float((expected - logits(fresh)).abs().max())
        loaded.detach()
    if not difference <= TOLERANCE:
        raise DeltaExpError(
            f"The delta that was saved does not compute what was trained: logits differ by up to {difference:.3g} on a probe "
            f"batch. It is kept in {str(folder)!r} for inspection. This is a fault of the delta type; please report it."
        )
    assert loaded.hash_check is HashCheck.MATCH
    return {"hash": loaded.hash_check.value, "max_logit_difference": difference, "probe_rows": len(expected)}


def verify(
    place: str, config: RunConfig | None, *, probe: bool = False, revision: str | None = None, console: Console | None = None
) -> int:
    """Check a delta and print what was found.

    Args:
        place: A folder or a repository.
        config: Names the backbone to compare with; None where only what was saved is checked.
        probe: Compare the logits on the stored probe batch, too.
        revision: The revision of the repository.
        console: Where to print; standard output where none is given.

    Returns:
        0, or 1 where something that should be known is not.

    Raises:
        DeltaExpError: If anything is wrong.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    start = time.perf_counter()
    folder = hub.fetch(place, revision=revision, needs="all")
    delta_config = AutoDeltaConfig.from_finetuned(folder)
    checks = []
    model: nn.Module | None = None
    if config is not None:
        model = backbones.load_recorded(config.backbone, folder, delta_config)
        saved = interop.read(folder, model)
    elif (folder / checkpoint.WEIGHTS).exists() or not delta_config.saved_with.origin:
        saved = checkpoint.read(folder)
    else:
        saved = SavedDelta(folder, delta_config, {}, None)  # what another library saved is understood with the backbone only
    checks += verification.check_saved(saved)
    record = delta_config.saved_with
    name = " ".join(filter(None, (record.backbone_class, record.backbone_checkpoint_name, record.backbone_revision)))
    if model is not None:
        checks += _with_backbone(saved, folder, model, name, probe)
    console.print(f"[bold]{delta_config.delta_type} delta in {place}[/bold]")
    for check in checks:
        mark = "[green]ok       [/green]" if check.known else "[yellow]unknown  [/yellow]"
        console.print(f"  {mark}  {check.what}: {check.detail}")
    if model is None:
        detail = f"trained on {name or 'a backbone that is not named'}; to compare, name it: backbone=..."
        console.print(f"  [dim]not asked[/dim]  backbone: {detail}")
    others = _others(saved, folder)
    if others:
        console.print(f"  no part of the delta, and not looked at: {', '.join(others)}")
    unknown = [check.what for check in checks if not check.known]
    if unknown:
        console.print(f"not verified: nothing was recorded that could be compared for {', '.join(unknown)}.")
        return 1
    console.print(f"verified in {time.perf_counter() - start:.1f} s")
    return 0


def _with_backbone(saved: SavedDelta, folder: Path, model: nn.Module, name: str, probe: bool) -> list[Check]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is known is what the table says
        delta_model = DeltaModel.from_finetuned(folder, backbone_model=model)
    count = len(delta_model.base_tensors())
    known = delta_model.hash_check is HashCheck.MATCH
    detail = f"{count} tensors of the base, the delta and the model's md5 are those of the trained {name}"
    checks = [Check("backbone", known, detail if known else f"the delta fits {type(model).__name__} by names and shapes")]
    if probe:
        difference = probes.compare(model, checkpoint.read_probe(saved) or {})
        checks.append(Check("probe", True, f"logits differ by {difference:.2g} of the largest"))
    return checks


def _others(saved: SavedDelta, folder: Path) -> list[str]:
    """Return the names of the files that no manifest lists."""
    if saved.manifest is None:
        return []
    listed = {*saved.manifest.files, MANIFEST, ".gitattributes"}
    return sorted(path.name for path in folder.iterdir() if path.name not in listed)
