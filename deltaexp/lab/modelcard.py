"""The model card of a run: what was trained, on what, how well it does, and how to load and verify it.

It is made from ``results.json`` alone, so that a push can make it anew with the name of the repository, and with the runs of
other seeds that have ended since.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch import nn

from deltaexp import card, checkpoint
from deltaexp.errors import CheckpointError
from deltaexp.lab import backbones, public
from deltaexp.lab.schema import choices
from deltaexp.lab.tasks.data import SPLITS
from deltaexp.manifest import check_files, read_manifest
from deltaexp.registry import DeltaConfig
from deltaexp.visualize import STYLES, Visualization

PICTURE = "structure.svg"
TASK_TYPES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "multiple_choice": "multiple-choice",
    "seq2seq": "text2text-generation",
    "causal_lm": "text-generation",
    "instruction": "text-generation",
    "extractive_qa": "question-answering",
    "image_classification": "image-classification",
}
"""The Hub's names for the kinds of tasks."""
PIPELINES = {"classification", "token_classification", "extractive_qa", "image_classification"}
"""Kinds whose model class the Hub's pipelines know, whatever the backbone."""
PURPOSES = ("init", "data", "dropout")
"""What the seeds of a run are for."""
ASIDE = {"seed", "seeds", "hub", "tracker", "resume"}
"""Keys of a config in which runs may differ whose results are compared over seeds."""
ASIDE_TRAINER = {"progress", "save_every", "keep_checkpoints", "cpu", "eval_batch_size"}
"""The same, of the trainer."""


def facts(backbone: backbones.Backbone, drawing: Console) -> dict[str, Any]:
    """Return what the card tells of a backbone, for ``results.json``: nothing in it names a folder of this machine.

    Args:
        backbone: The backbone.
        drawing: What `drawn` returned for it.
    """
    settings = backbone.model.config
    commit = getattr(settings, "_commit_hash", None)
    local = public.is_local(backbone.source)
    return {
        "class": type(backbone.model).__name__,
        "base_model": None if local else card.base_model(backbone.source, from_hub=commit is not None),
        "revision": None if local else commit,
        "local": local,
        "loading_code": backbones.loading_code(backbone.model, backbone.source, public=True),
        "structure": [line.rstrip() for line in drawing.export_text(clear=False).splitlines()],
    }


def _pipeline(kind: str, model_class: str) -> str | None:
    """Return the Hub's pipeline for a kind of task, where the backbone has the head that it wants."""
    return TASK_TYPES[kind] if kind in PIPELINES and "Conditional" not in model_class and "LM" not in model_class else None


def picture(backbone: backbones.Backbone, drawing: Console) -> str:
    """Return the structure of a backbone with its delta, as `drawn` drew it, as an SVG image."""
    return drawing.export_svg(title=type(backbone.model).__name__, clear=False)


def build(config: DeltaConfig, results: dict[str, Any], folder: Path, hub: dict[str, Any] | None = None) -> str:
    """Return the text of the card.

    Args:
        config: The delta's config, with the record of its backbone.
        results: What the run found.
        folder: The delta's folder, beside whose run those of other seeds may lie.
        hub: The keys of ``hub`` to go by; the run's where none are given.
    """
    run, others = results["config"], siblings(folder, results)
    # A branch that a run asked for says nothing of a push that names none; the licence stays the run's.
    hub = {"license": run["hub"].get("license"), **(hub if hub is not None else run["hub"])}
    hub["license"] = hub["license"] or run["hub"].get("license")
    task, backbone, metric = run["task"], results["backbone"], results["task_metric"]
    repo = repository(run, hub) or "PATH_OR_REPO"
    revision = hub.get("revision") if hub.get("revision") != "main" and repo != "PATH_OR_REPO" else None
    dataset = task.get("dataset") or card.base_model(task["data"])
    head = card.front(
        tags=card.tags(config.delta_type, task["name"], f"task:{task['name']}", f"backbone:{run['backbone']['name']}"),
        base_model=backbone["base_model"],
        datasets=[dataset] if dataset else None,
        language=[task["language"]] if task.get("language") else None,
        license=hub.get("license"),
        pipeline_tag=_pipeline(task["kind"], results["backbone"]["class"]),
        metrics=[metric],
        model_name=repo.split("/")[-1] if "/" in repo else "delta",
        eval_results=_evaluated(results, others, dataset),
    )
    score = results["metrics"]["after"][metric]
    spread = _spread([score, *(one["metrics"]["after"][metric] for one in others)])
    parts = [
        head,
        f"# {run['task']['name']}: a {config.delta_type} delta for {backbone['base_model'] or run['backbone']['name']}",
        f"{results['parameters']['delta']:,} trained parameters that belong to a {backbone['class']} of "
        f"{results['parameters']['backbone']:,}, made with deltaexp. They reach {metric} {score:.4f} on "
        f"{results['evaluated_on']}{f' ({spread} over {len(others) + 1} seeds)' if others else ''}. The delta holds digests of "
        "the backbone that it belongs to: loading it onto another is refused.",
        "## Use",
        card.loading(backbone["loading_code"], repo, revision),
        "Is it whole, and is the backbone the right one?\n\n```bash\n"
        f"python -m deltaexp verify {repo} {_named(run, backbone)}\n```",
        _metrics(results, others),
        _trained(results),
        f"## Structure\n\n![The backbone with the delta]({PICTURE})\n\n<details><summary>as text</summary>\n\n```text\n"
        + "\n".join(backbone["structure"])
        + "\n```\n\n</details>",
        _digests(results),
        card.config_table(config),
    ]
    return "\n\n".join(parts) + "\n"


def refresh(folder: str | Path, hub: dict[str, Any]) -> bool:
    """Make the card of a run's delta anew for a push, and say whether it was one of a run.

    Raises:
        CheckpointError: If a file of the delta is not the one that was saved.
    """
    folder = Path(folder)
    results = of_run(folder)
    if results is None:
        return False
    before = (folder / checkpoint.CARD).read_text(encoding="utf-8")
    # A licence that was given once stays, though no config knows it.
    license_ = hub.get("license") or results["config"]["hub"].get("license") or card.metadata(before).get("license")
    text = build(checkpoint.read_config(folder), results, folder, {**hub, "license": license_})
    if text != before:
        checkpoint.add_files(folder, {checkpoint.CARD: text})
    return True


def of_run(folder: Path) -> dict[str, Any] | None:
    """Return the results of the run that saved a delta, after checking the delta's files; None where no run did.

    Raises:
        CheckpointError: If a file is not the one that was saved.
    """
    manifest = read_manifest(folder)
    if manifest is None or checkpoint.RESULTS not in manifest.files:
        return None
    check_files(folder, manifest, sorted(manifest.files))
    try:
        results = json.loads((folder / checkpoint.RESULTS).read_text(encoding="utf-8"))
    except ValueError:
        return None
    complete = isinstance(results, dict) and {"config", "backbone", "metrics", "base_sha256"} <= set(results)
    return results if complete else None


def repository(run: dict[str, Any], hub: dict[str, Any]) -> str | None:
    """Return the name of the repository that a run's config asks for; None where it names none."""
    if not hub.get("repo_id"):
        return None
    return public.repository(hub["repo_id"], run["delta_type"], run["backbone"]["name"], run["task"]["name"], run["seed"])


def siblings(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the finished runs beside this one with the same config and data, and other seeds; one of each."""
    wanted, seen = _comparable(results), [results["seeds"]]
    found = []
    for path in sorted(folder.resolve().parent.parent.glob(f"*/delta/{checkpoint.RESULTS}")):
        try:
            other = of_run(path.parent) if path.parent != folder.resolve() else None
        except CheckpointError:
            continue  # it is damaged, so it says nothing
        if other is not None and other["seeds"] not in seen and _comparable(other) == wanted:
            seen.append(other["seeds"])
            found.append(other)
    return found


def _comparable(results: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in results["config"].items() if key not in ASIDE}
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in ASIDE_TRAINER}
    return {"config": config, "data": results["data_fingerprint"], "base": results["base_sha256"]}


def _spread(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation; the mean alone of one value."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


def _names(results: dict[str, Any]) -> list[str]:
    """Return the names of the metrics, the task's own first."""
    return sorted(results["metrics"]["after"], key=lambda name: (name != results["task_metric"], name))


def _evaluated(results: dict[str, Any], others: Sequence[dict[str, Any]], dataset: str | None) -> list[Any]:
    """Return the metrics for the card's model-index, the task's own first."""
    from huggingface_hub import EvalResult

    task, split = results["config"]["task"], results["evaluated_on"]
    after = results["metrics"]["after"]
    names = _names(results)
    values = [(name, name, after[name]) for name in names]
    for name in names if others else []:
        every = [after[name], *(one["metrics"]["after"][name] for one in others)]
        values.append((name, f"{name}, mean of {len(every)} seeds", statistics.fmean(every)))
        values.append((name, f"{name}, standard deviation of {len(every)} seeds", statistics.stdev(every)))
    return [
        EvalResult(
            task_type=TASK_TYPES[task["kind"]],
            dataset_type=dataset or task["name"],
            dataset_name=task["name"],
            dataset_config=task["subset"],
            dataset_split=task[f"{split}_split"],
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for kind, name, value in values
        if math.isfinite(value)
    ]


def _metrics(results: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    before, after = results["metrics"].get("before", {}), results["metrics"]["after"]
    several = f" {len(others) + 1} seeds |" if others else ""
    rows = []
    for name in _names(results):
        value = after[name]
        old = f"{before[name]:.4f}" if name in before else ""
        spread = f" {_spread([value, *(one['metrics']['after'][name] for one in others)])} |" if others else ""
        rows.append(f"| {name} | {old} | {value:.4f} |{spread}")
    text = (
        f"## Metrics\n\nOn the {results['evaluated_on']} split of {results['config']['task']['name']}, "
        f"{results['rows'][results['evaluated_on']]:,} rows.\n\n"
        f"| metric | the backbone as it is | with the delta |{several}\n| --- | --- | --- |{' --- |' if others else ''}\n"
    )
    text += "\n".join(rows)
    if others:
        every = sorted(_seed(one) for one in (results, *others))
        text += (
            f"\n\nMean and sample standard deviation over the runs with the seeds {', '.join(every)}, which have the same "
            f"config and the same data; this delta is the one of seed {_seed(results)}."
        )
    return text


def _seed(results: dict[str, Any]) -> str:
    """Return a run's seed, or its seeds where they differ."""
    seeds = [str(results["seeds"][name]) for name in PURPOSES]
    return seeds[0] if len(set(seeds)) == 1 else "/".join(seeds)


def _trained(results: dict[str, Any]) -> str:
    """Return how it was trained, and the config of the run."""
    run, versions, memory = results["config"], results["versions"], results["peak_memory_bytes"]
    peak = memory.get("cuda", memory.get("training", memory.get("process", 0)))
    batch = run["trainer"]["batch_size"] * run["trainer"]["gradient_accumulation_steps"]
    libraries = ("deltaexp", "python", "torch", "transformers", "tokenizers", "datasets", "accelerate")
    rows = {
        "steps": f"{results['steps']:,}, of {batch} rows each",
        "rows": ", ".join(f"{split} {results['rows'][split]:,}" for split in SPLITS if split in results["rows"]),
        "trainable parameters": f"{results['parameters']['trainable']:,} of {results['parameters']['backbone']:,}",
        "precision": results.get("precision", "fp32"),
        "learning rate": f"{run['trainer']['learning_rate']:g}, {run['trainer']['lr_scheduler']}",
        "seeds": ", ".join(f"{name} {results['seeds'][name]}" for name in PURPOSES),
        "time": f"{results['seconds']['train']:.1f} s training, {results['seconds']['total']:.1f} s in all",
        "peak memory": f"{peak / 2**20:,.0f} MiB",
        "hardware": f"{versions['device']}, {versions['platform']}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in libraries if name in versions),
    }
    kept = {key: value for key, value in run.items() if key not in ("hub", "tracker")}
    table = "\n".join(f"| {name} | {card.cell(value)} |" for name, value in rows.items())
    return (
        f"## Training\n\n| what | value |\n| --- | --- |\n{table}\n\n<details><summary>the config of the run</summary>\n\n"
        f"```json\n{json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False)}\n```\n\n</details>"
    )


def _digests(results: dict[str, Any]) -> str:
    rows = {
        "the backbone (sha256)": results["base_sha256"],
        "the model with the delta (md5)": results["backbone_hash"],
        "the data (sha256)": results["data_fingerprint"],
        **{f"`{name}` (sha256)": value for name, value in sorted(results["digests"].items()) if name != checkpoint.CARD},
    }
    table = "\n".join(f"| {name} | `{value}` |" for name, value in rows.items())
    return (
        f"## Digests\n\n| what | digest |\n| --- | --- |\n{table}\n\nThe digest of every tensor of backbone and delta stands "
        "in `manifest.json`."
    )


def _named(run: dict[str, Any], backbone: dict[str, Any]) -> str:
    """Return the words that name the backbone on the command line."""
    name = run["backbone"]["name"]
    if backbone["local"]:
        return "backbone=local backbone.source=FOLDER_OF_THE_BACKBONE"
    return f"backbone={name}" if name in choices("backbone") else f"backbone=local backbone.source={run['backbone']['source']}"


def drawn(model: nn.Module) -> Console:
    """Draw the structure of a model on a console that records it; what is frozen as a whole is shown in one line."""
    tree = Visualization(model).structure_graph(Console(file=io.StringIO()))
    _prune(tree)
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(tree)
    console.print(Text("legend: ").append_text(Text(" ").join(Text(name, style) for name, style in STYLES.items())))
    return console


def _prune(tree: Tree) -> bool:
    """Take the branches away below which nothing is trained, and say whether anything is."""
    trained = [_prune(child) for child in tree.children]
    if not tree.children:
        label = str(tree.label)
        return ":[" in label and not label.endswith("frozen")  # a parameter
    if not any(trained):
        tree.children = []
    return any(trained)
