"""Weights & Biases: curves, tables, artifacts with digests and lineage; never a token.

No module but this and `deltaexp.lab.tracking.wandb_file` imports wandb.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import wandb
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

from deltaexp import __version__, checkpoint
from deltaexp.checksum import file_sha256
from deltaexp.lab import public
from deltaexp.lab.config import TrackerConfig
from deltaexp.lab.tracking import wandb_file
from deltaexp.lab.tracking.base import Tracker, numbers, title

PREDICTIONS = "predictions.jsonl"
ROWS = 10_000
"""Rows of predictions that are logged at most; W&B shows no more of a table."""
PATIENCE = {"init_timeout": 30.0, "finish_timeout": 600.0}
"""Seconds that a run waits for W&B, unless its own environment variables say otherwise: what is not sent by then stays in the
run's folder, for ``wandb sync``."""


_unreachable: list[Exception] = []
"""Why W&B could not be reached; the next runs of this process do not wait for it again."""


class WandbTracker(Tracker):
    """Weights & Biases.

    Args:
        config: How to log.
        described: The run's config.
        folder: The run's folder; one that is continued there stays the same run of W&B.
        say: Prints a sentence.
    """

    def __init__(
        self, config: TrackerConfig, described: Mapping[str, Any], folder: Path, say: Callable[[str], None] = print
    ) -> None:
        super().__init__()
        self.config, self.folder = config, folder
        sessions = wandb_file.earlier(folder)
        self.run = _init(config, folder, say, "train", title(described), described)
        # What W&B has it does not take back; of a run that is continued online it knows the last step itself.
        kept, there = wandb_file.last_steps(sessions), self.run.starting_step - 1
        self.told = {part: max(there, kept.get(part, -1)) for part in ("train", "eval")}

    def write(self, part: str, values: Mapping[str, float], step: int) -> None:
        """Log a point of each curve."""
        self.run.log({f"{part}/{name}": value for name, value in values.items()}, step=step)

    def summarise(self, results: Mapping[str, Any], delta: Path) -> None:
        """Log the metrics before and after as a table, the numbers as the run's summary, and what went in and came out."""
        before, after = results["metrics"].get("before", {}), results["metrics"]["after"]
        table = wandb.Table(columns=["metric", "before", "after"], data=[[k, before.get(k), after[k]] for k in after])
        self.run.log({"results": table}, step=results["steps"])
        self.run.summary.update(numbers(results))
        if self.config.predictions:
            self.run.log({"predictions": _predictions(self.folder / PREDICTIONS)}, step=results["steps"])
        config = results["config"]
        source, base = config["backbone"]["source"], results["base_sha256"]
        revision = results["backbone"]["revision"] or config["backbone"]["revision"]
        backbone = {"source": source, "revision": revision, "class": results["backbone"]["class"], "base_sha256": base}
        hub = None if results["backbone"]["local"] or public.REMOTE.match(source) else f"{source}/tree/{revision or 'main'}"
        data, fingerprint = config["task"]["data"], results["data_fingerprint"]
        known = config["task"]["dataset"] or (data if "/" in data and not public.REMOTE.match(data) else None)
        self._use(f"backbone-{config['backbone']['name']}", "backbone", hub, source, base, backbone)
        rows = {"fingerprint": fingerprint, "source": data, "rows": results["rows"]}
        self._use(f"data-{config['task']['name']}", "dataset", known and f"datasets/{known}", data, fingerprint, rows)
        self._log_delta(results, delta, backbone)

    def finish(self, failed: bool) -> None:
        """Close the run, marked as failed where it is."""
        self.run.finish(exit_code=1 if failed else 0)

    def _use(self, name: str, kind: str, hub: str | None, source: str, digest: str, metadata: dict[str, Any]) -> None:
        """Say that the run used something, which is named by its place and its digest and not uploaded."""
        if self.run.disabled:
            return
        place = f"https://huggingface.co/{hub}" if hub else source if ":" in source else f"local:{source}"
        artifact = wandb.Artifact(_plain(name), kind, metadata=metadata)
        artifact.manifest.add_entry(
            ArtifactManifestEntry(path=kind, ref=cast(Any, place), digest=cast(Any, f"sha256:{digest}"))
        )
        if self.run.offline:
            # Run.use_artifact refuses offline, though what it does first is all that `wandb sync` needs.
            self.run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
        else:
            self.run.use_artifact(artifact)

    def _log_delta(self, results: Mapping[str, Any], delta: Path, backbone: dict[str, Any]) -> None:
        """Log the delta's folder as it is, with the digests of its manifest."""
        config, manifest = results["config"], checkpoint.read_manifest(delta)
        assert manifest is not None
        metadata = {
            "sha256": {**manifest.files, checkpoint.MANIFEST: file_sha256(delta / checkpoint.MANIFEST)},
            "base_sha256": results["base_sha256"],
            "backbone": backbone,
            "data_fingerprint": results["data_fingerprint"],
            "delta_type": config["delta_type"],
            "task": config["task"]["name"],
            "seed": config["seed"],
            results["task_metric"]: results["metrics"]["after"][results["task_metric"]],
            "parameters": results["parameters"],
            "deltaexp": __version__,
        }
        name = f"delta-{config['delta_type']}-{config['backbone']['name']}-{config['task']['name']}"
        artifact = wandb.Artifact(_plain(name), "delta", metadata=metadata)
        for path in sorted(delta.iterdir()):
            # A delta does not change once it is saved, so no copy of it is made.
            artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact)


def log_sweep(config: TrackerConfig, folder: Path, rows: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Log the runs of a sweep as one table, in a run of the sweep's group; a sweep that is continued stays the same run.

    Args:
        config: How to log.
        folder: The sweep's folder.
        rows: What `deltaexp.lab.tracking.sweep.table` returned.
        say: Prints a sentence.
    """
    run = _init(config, folder, say, "sweep", config.group or folder.name, {"runs": len(rows)})
    columns = list(rows[0]) if rows else []
    run.log({"runs": wandb.Table(columns=columns, data=[list(row.values()) for row in rows])})
    run.summary.update({"runs": len(rows), "finished": sum(row["status"] == "finished" for row in rows)})
    run.finish()


def _init(
    config: TrackerConfig,
    folder: Path,
    say: Callable[[str], None],
    job_type: str,
    name: str,
    described: Mapping[str, Any],
) -> Any:
    """Start a run of W&B, or go on with the one that was logged to this folder; what cannot be sent is kept for later."""
    sessions = wandb_file.earlier(folder)
    continued = sessions[-1].name.rsplit("-", 1)[1] if sessions else None
    patience = {key: value for key, value in PATIENCE.items() if f"WANDB_{key.upper()}" not in os.environ}

    def init(mode: str | None) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=job_type,
            mode=cast(Any, mode),  # checked with the config
            tags=config.tags or None,
            name=name,
            config=dict(described),
            dir=str(folder),
            id=continued,
            resume="allow" if continued else None,
            settings=wandb.Settings(**patience),
        )

    try:
        return init("offline" if _unreachable and config.mode in (None, "online") else config.mode)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        if config.mode in ("offline", "disabled"):
            raise
        _unreachable.append(error)
        run = init("offline")
        say(
            f"Weights & Biases cannot be reached: {' '.join(str(error).split())} The log is kept in {str(folder / 'wandb')!r}; "
            f"send it later with: wandb sync {folder / 'wandb'}/offline-run-*"
        )
        return run


def _predictions(path: Path) -> Any:
    """Return the answers that a run kept as a table, with a column for each part of the input."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(ROWS)):  # noqa: B905
            row = json.loads(line)
            rows.append({**row.pop("inputs", {}), **row})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[_cell(row.get(name)) for name in columns] for row in rows])


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, ensure_ascii=False)


def _plain(name: str) -> str:
    """Return a name with what an artifact's may not have made into hyphens."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:128]
