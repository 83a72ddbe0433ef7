"""One run, from a checked config to a verified delta: `run` reads top to bottom as what happens, in this order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from deltaexp import checkpoint
from deltaexp.auto import AutoDeltaModel
from deltaexp.checksum import model_sha256
from deltaexp.digest_cache import model_digests
from deltaexp.errors import DamagedFileError, RunError, listing
from deltaexp.lab import (
    arguments,
    backbones,
    checkpoints,
    estimate,
    modelcard,
    predictions,
    processes,
    pruning,
    public,
    pushing,
    recovery,
    replaying,
    sharding,
    shortcuts,
    speeding,
    telling,
    tracking,
    training,
    verifying,
    writing,
)
from deltaexp.lab.callbacks import LogCallback
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import RunConfig, completed
from deltaexp.lab.memory import PeakMemory
from deltaexp.lab.sharing import Shared
from deltaexp.lab.tasks import data as task_data
from deltaexp.lab.tasks.kinds import Kind, Split, choose
from deltaexp.lab.telling import Clock
from deltaexp.registry import DeltaConfig
from deltaexp.tree import backbone_tensors


@dataclass
class Outcome:
    """What a run returns."""

    folder: Path
    """The folder of the delta."""
    score: float
    """The task's metric after training."""
    results: dict[str, Any]


@speeding.without_denormals()
def run(
    config: RunConfig,
    delta_config: DeltaConfig,
    folder: str | Path,
    console: Console | None = None,
    again: str = "the same call, with resume set in its config",
    shared: Shared | None = None,
) -> Outcome:
    """Train, evaluate, save, verify and, if asked, push one delta, or go on with that where ``config.resume`` says so.

    Where several processes were launched together, all of them call this with the same config (see `deltaexp.lab.processes`).

    Args:
        config: The checked config of the run.
        delta_config: The checked config of the delta.
        folder: Where the run keeps what it makes; the delta goes to ``delta`` in it. What the first process says counts.
        console: Where to print; standard output where none is given.
        again: The command that continues the run if it is interrupted.
        shared: What it shares with other runs of this process; nothing where none is given.

    Raises:
        DeltaExpError: If a step fails; a delta that was saved before stays where it is.
    """
    processes.check(config.trainer.sharding)
    processes.start(config.trainer.cpu)
    folder, again = processes.broadcast((Path(folder).resolve(), again))
    config = completed(config, delta_config)
    config_dict = recovery.describe(config, delta_config)
    if not processes.is_main():
        console = Console(quiet=True)
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, progress=False))
    console = console or Console(highlight=False, soft_wrap=True)
    with recovery.explained(folder, again), _claim(folder, config_dict, config.resume) as claim:
        shared = shared or Shared(active=False)
        outcome: Any = _show(config, claim, console) if claim.finished else _train(config, delta_config, claim, console, shared)
        return processes.broadcast(outcome)


@contextlib.contextmanager
def _claim(folder: Path, config: dict[str, Any], resume: bool) -> Iterator[recovery.Claim]:
    """Take the folder for this run, in the first of its processes, whose claim all are told of."""
    own = recovery.claim(folder, config, resume) if processes.is_main() else contextlib.nullcontext()
    with own as claim:
        shared: Any = processes.broadcast(claim)
        yield shared


def _train(
    config: RunConfig, delta_config: DeltaConfig, claim: recovery.Claim, console: Console, shared: Shared
) -> Outcome | None:
    """Do the whole of a run, or what is left of it; only the first process returns what came of it."""
    folder, seeds, config_dict = claim.folder, config.resolved_seeds(), claim.record.config
    target = folder / recovery.DELTA
    pruning.check(claim)
    arguments.precision(config.trainer)  # what the hardware cannot do is told before anything is loaded
    saved = Checkpoints(folder / recovery.CHECKPOINTS, config.trainer.save_every)
    checkpoint_folder, notes = processes.broadcast(_where_it_was(claim, saved, console))
    together = {"number of processes": processes.count()}
    _check_same(notes.get("inputs", {}), together)
    clock = Clock(console, dict(notes.get("seconds", {})))
    described = public.publishable(config_dict)
    say = functools.partial(console.print, style="yellow", markup=False)
    trackers = tracking.Trackers(say)
    if processes.is_main():
        trackers.start(
            config.tracker, described, folder, 0 if checkpoint_folder is None else checkpoints.step(checkpoint_folder)
        )
    failed, speed = True, contextlib.ExitStack()
    try:
        # 1. Seeds before anything is initialised; data and dropout get theirs in the Trainer.
        transformers.set_seed(seeds["init"])

        # 2. The data, whose labels a new head needs to know.
        with clock.phase("data", f"task {config.task.name} from {config.task.data}"), processes.main_first():
            kind_class = choose(config.task, backbones.settings_of(config.backbone), config.backbone.name)
            load = functools.partial(task_data.load, config.task, kind_class, progress=config.trainer.progress)
            data = shared.once(["data", config.task, kind_class.__name__], load)
            task = dataclasses.replace(config.task, labels=data.labels)
        for note in data.notes:
            console.print(f"  {note}", markup=False)

        # 3. Backbone and tokenizer; what the checkpoint lacks (a new head) is found and belongs to the delta.
        with clock.phase("load backbone", f"backbone {config.backbone.name} from {config.backbone.source}"):
            backbone = shared.backbone(config, task)
        if backbone.new:
            console.print(f"  new, trained and saved with the delta: {listing(backbone.new)}")

        before = notes.get("before")
        to_evaluate = before is None and config.trainer.evaluate_before
        # All of it, new heads included; sharded weights could not be read.
        plain = model_sha256(model_digests(backbone.model, backbone_tensors(backbone.model))) if to_evaluate else None

        # 4. Targets, attachment, freezing.
        with clock.phase("attach", f"delta {delta_config.delta_type}"):
            transformers.set_seed(seeds["init"])  # the delta starts the same whatever the head needed
            delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone.model)
            delta_model.freeze_module(exclude=[*delta_config.unfrozen_modules, *backbone.new])
        for pattern, names in delta_model.targets.items():
            console.print(f"  {pattern} -> {len(names)} modules: {listing(names, 2)}")
        counts = delta_model.counts()
        share = counts["trainable"] / counts["backbone"]
        console.print(f"  trainable {counts['trainable']:,} of {counts['backbone']:,} parameters ({share:.3%})")

        # 5. The data tokenised, once and cached by content.
        with clock.phase("tokenise", f"tokenising for {backbone.kind.__name__}"), processes.main_first():
            kind = backbone.kind(task, backbone.processor, backbone.model.config, delta_config.positions())
            made_of = ["splits", data.fingerprint, config.backbone, kind_class.__name__, kind.cache_key()]
            splits = shared.once(made_of, functools.partial(kind.splits, data))
        base = model_sha256(model_digests(backbone.model, delta_model.base_tensors()))
        choice = speeding.choose(config, backbone.model)
        config, precision = dataclasses.replace(config, trainer=choice.trainer), choice.trainer.precision
        inputs = {"data": data.fingerprint, "digest of the backbone": base, "precision": precision, **together}
        inputs["way of computing"] = choice.name
        _check_same(notes.get("inputs", {}), inputs)
        rows = {name: len(split.rows) for name, split in splits.items()}
        truncated = {name: split.truncated for name, split in splits.items()}
        console.print("  rows: " + listing(f"{name} {count:,}" for name, count in rows.items()))
        for line in telling.about_lengths(kind, rows, truncated):
            console.print(f"  [yellow]{line}[/yellow]")
        if choice.reasons:
            console.print(f"  speed: {'; '.join(choice.reasons)}")
        if config.trainer.sharding:
            sharding.shard(delta_model, config.trainer.cpu)
        callbacks = [LogCallback(trackers), *pruning.callbacks(claim)]
        trainer = training.build(config.trainer, delta_model, kind, splits, saved, seeds, callbacks)
        speed.enter_context(speeding.applied(choice, backbone.model))

        # 6. The backbone as it is, 7. training, 8. the delta.
        final = splits[data.evaluated]
        short = speed.enter_context(shortcuts.Shortcuts(config, trainer, ["train", "validation", data.evaluated], base))
        if to_evaluate:
            told = f"evaluating the backbone as it is on {data.evaluated}"
            with clock.phase("evaluate before", told), delta_model.detached():
                measured = ["before", plain, data.fingerprint, config.task, kind.cache_key(), config.backbone, precision]
                measured += [config.trainer.eval_batch_size, config.trainer.cpu, short.in_few is None]
                before = shared.once(measured, functools.partial(training.evaluate, trainer, final))
        with clock.phase("shortcuts", "finding out what need not be computed"):
            short.begin()
        console.print(*(f"  {line}" for line in short.told), sep="\n", markup=False)
        memory, peak = PeakMemory(), notes.get("peak", {})
        noted = {"before": before, "inputs": inputs}
        trainer.notes = lambda: {**noted, "seconds": clock.read(), "peak": _larger(peak, memory.read())}
        told = f"training for {trainer.args.max_steps:,} steps in {precision}, learning rate {config.trainer.learning_rate:g}"
        told += telling.together(processes.count(), trainer.global_batch_size, config.trainer.sharding)
        target_length = config.task.max_target_length
        with clock.phase("train", told), replaying.replayed(choice.graphs, trainer, short, target_length, console) as graphs:
            if counts["trainable"]:
                shared.train(trainer, short, checkpoint_folder, clock)
            else:
                console.print("  nothing is trainable: the backbone is measured as it is")
        pruning.check(claim)
        peak = functools.reduce(_larger, processes.gather(_larger(peak, memory.read())))
        with clock.phase("evaluate after", f"evaluating with the delta on {data.evaluated}"):
            after = training.evaluate(trainer, final)
        if (config.task.save_predictions or config.tracker.predictions) and processes.is_main():
            predictions.write(folder / predictions.PREDICTIONS, kind, final.rows, trainer.answers)
        metrics = {"after": after} if before is None else {"before": before, "after": after}
        if data.evaluated != "validation":
            # What a choice between runs goes by: the test split is for the one that was chosen.
            with clock.phase("validate", "evaluating with the delta on validation"):
                metrics["validation"] = training.evaluate(trainer, splits["validation"])

        trainer.unwrap()
        speed.close()
        if not processes.is_main():
            failed = False
            return None

        # 9. Save; load into a fresh backbone, as others will; compare.
        stage = folder / ".delta.unverified"
        with clock.phase("save", "saving"):
            # An embedded backbone lies in a folder whose own name says nothing to others.
            name = config.backbone.source if ":" in config.backbone.source else None
            batch = functools.partial(_batch, kind, backbone.model, final)
            stored = batch(config.task.probe_rows) if config.task.probe_rows else None
            manifest = delta_model.save_finetuned(stage, backbone_name=name, probe=stored)
        with clock.phase("verify", "loading the saved delta into an untouched backbone and comparing"):
            few = {name: value.to(backbone.model.device) for name, value in batch(verifying.ROWS).items()}
            check = verifying.loads_again(delta_model, stage, few, shared.untouched(config, task, delta_model))

        # 10. Results and card, then the folder gets its name: what is called delta is complete and verified.
        drawing = modelcard.drawn(backbone.model)
        results = {
            "config": described,
            "backbone": modelcard.facts(backbone, drawing),
            "task_metric": kind.metric,
            "greater_is_better": kind.greater_is_better,
            "labels": data.labels,
            "evaluated_on": data.evaluated,
            "metrics": metrics,
            "training_log": trainer.state.log_history,
            "steps": trainer.state.global_step,
            "precision": precision,
            "speed": choice.recorded() | {"replays": graphs},
            "processes": processes.count(),
            "global_batch_size": trainer.global_batch_size,
            "sharding": config.trainer.sharding,
            "shortcuts": short.facts(),
            "trained_together": shared.joined,
            "seeds": seeds,
            "rows": rows,
            "truncated": truncated,
            "data_fingerprint": data.fingerprint,
            "targets": delta_model.targets,
            "new_parameters": backbone.new,
            "parameters": counts,
            "verification": check,
            "backbone_hash": delta_model.config.saved_with.backbone_hash,
            "base_sha256": delta_model.config.saved_with.base_sha256,
            "digests": manifest.files,
            "seconds": clock.read(),
            "sessions": claim.record.sessions,
            "peak_memory_bytes": peak,
            "inference_flops": estimate.inference_flops(delta_model, few),
            "versions": telling.versions(),
        }
        files = {
            checkpoint.RESULTS: checkpoint.dump(results),
            checkpoint.CARD: modelcard.build(delta_model.config, results, stage),
            modelcard.PICTURE: modelcard.picture(backbone, drawing),
        }
        checkpoint.add_files(stage, files)
        os.replace(stage, target)
        writing.sync(folder)
        _tidy(config, folder)

        # 11. Push if asked; the local delta is complete whatever the Hub says.
        trackers.summarise(results, target)
        telling.print_results(console, results, target, backbones.loading_code(backbone.model, backbone.source))
        shared.give_back(delta_model)
        _push(config, claim, clock)
        failed = False
        return Outcome(target, after[kind.metric], results)
    finally:
        speed.close()
        trackers.finish(failed)


def _where_it_was(claim: recovery.Claim, saved: Checkpoints, console: Console) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint that a run goes on from, with the run's notes in it, and say so."""
    if not claim.continued:
        return None, {}
    newest, faults = saved.newest()
    for sentence in faults:
        console.print(sentence, style="yellow", markup=False)
    changed = claim.record.changed_versions()
    if changed:
        console.print(
            f"Since this run began, versions have changed ({listing(changed)}): what it ends in may differ from what an "
            "uninterrupted run would have ended in.",
            style="yellow",
            markup=False,
        )
    if newest is None:
        console.print(f"beginning anew in {claim.folder}: the interrupted run there has no complete checkpoint", markup=False)
        return None, {}
    console.print(f"continuing the run in {claim.folder} after step {checkpoints.step(newest):,}", markup=False)
    return newest, checkpoints.read_values(newest)["notes"]


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that an interrupted run goes on with what it began with.

    Raises:
        RunError: If the data or the backbone are others by now.
    """
    for name, value in now.items():
        if before.get(name, value) != value:
            raise RunError(
                f"The run cannot be continued: the {name} changed since it began, from {before[name]} to {value}. "
                "Bring back what it began with, or begin anew without resume=true."
            )


def _larger(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {name: max(first.get(name, 0), second.get(name, 0)) for name in {**first, **second}}


def _tidy(config: RunConfig, folder: Path) -> None:
    """Delete the checkpoints of a run whose delta is complete, unless they are to be kept."""
    if not config.trainer.keep_checkpoints:
        shutil.rmtree(folder / recovery.CHECKPOINTS, ignore_errors=True)


def _show(config: RunConfig, claim: recovery.Claim, console: Console) -> Outcome | None:
    """Return what a finished run had found, its files being checked, and push it if it is to be and has not been.

    Raises:
        DamagedFileError: If a file is not the one that was written.
    """
    if not processes.is_main():
        return None
    target = claim.folder / recovery.DELTA
    _tidy(config, claim.folder)
    manifest = checkpoint.read_manifest(target)
    if manifest is None:
        raise DamagedFileError(f"The finished run's delta in {str(target)!r} has no manifest.json. {checkpoint.DAMAGED}")
    checkpoint.check_files(target, manifest, tuple(manifest.files))
    results = json.loads((target / checkpoint.RESULTS).read_text(encoding="utf-8"))
    score = results["metrics"]["after"][results["task_metric"]]
    console.print(
        f"this run is done already, its files are those that it saved: {results['task_metric']} {score:.4f} on "
        f"{results['evaluated_on']}\ndelta: {target}",
        markup=False,
    )
    if config.task.save_predictions and not (claim.folder / predictions.PREDICTIONS).exists():
        console.print(
            f"It kept no predictions; make them with: python -m deltaexp eval delta={target} predictions=true out=FOLDER",
            markup=False,
        )
    _push(config, claim, Clock(console))
    return Outcome(target, score, results)


def _push(config: RunConfig, claim: recovery.Claim, clock: Clock) -> None:
    """Push the delta of a finished run if that is asked for and was not done before, and note where it is."""
    if config.hub.push and config.hub.repo_id and not claim.record.pushed:
        hub = dataclasses.asdict(config.hub)
        repo_id = pushing.named(claim.record.config, hub)
        with clock.phase("push", f"pushing to {repo_id}"):
            say = functools.partial(clock.console.print, style="yellow", markup=False)
            url = pushing.push(claim.folder / recovery.DELTA, repo_id, hub, say).url
        claim.record.pushed = url
        claim.record.write(claim.folder)
        clock.console.print(f"pushed, read back and verified: {url}")


def _batch(kind: Kind, model: Any, split: Split, count: int) -> Any:
    """Return the first rows as a batch for the model."""
    rows = split.features
    return kind.inputs(kind.collator(model)([rows[index] for index in range(min(count, len(rows)))]))
