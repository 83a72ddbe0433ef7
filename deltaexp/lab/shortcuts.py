"""What a run leaves out because it would come to the same: frozen blocks on texts that are known, tokens that nobody reads.

Norms and activations of the backbone are computed in few operations (`deltaexp.norms_and_gelus`). Whether the rest can be left
out is decided from the architecture (`deltaexp.frozen`, `deltaexp.one_token`), and then tried out on a few rows of the training
split: outputs, loss and gradients must be the same, to rounding, with and without. Where they are not, all is computed. The
decision depends on the config, the data and the machine alone, and not on what is on the disk, so that the same command gives
the same delta.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

from deltaexp import frozen, norms_and_gelus, one_token, quantised, speed
from deltaexp.frozen import Frozen, Shortcut
from deltaexp.lab import activations, processes
from deltaexp.lab.activations import Folder, Known, Texts
from deltaexp.lab.config import RunConfig
from deltaexp.lab.tasks.kinds.text import DecoderText, Ranking
from deltaexp.model import DeltaModel
from deltaexp.norms_and_gelus import InFew
from deltaexp.one_token import LastBlock, OneToken

if TYPE_CHECKING:
    from deltaexp.lab.training import DeltaTrainer

ROWS = 4
"""Rows on which is tried out whether the result is the same."""
TOLERANCE: dict[torch.dtype | None, float] = {
    torch.float32: 1e-4,
    torch.float64: 1e-10,
    torch.float16: 0.02,
    torch.bfloat16: 0.1,
}
"""By how much numbers may differ that were computed in a dtype, as a part of the largest."""
NOT_COMPUTED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""What a model raises that cannot go on from activations."""


def refused(config: RunConfig, delta_model: DeltaModel) -> str | None:
    """Say in a clause why nothing can be left out of a run, whatever the architecture; None where nothing speaks against it."""
    model: Any = delta_model.backbone_model
    if config.trainer.shortcuts == "off":
        return "trainer.shortcuts=off"
    if config.trainer.compile:
        return "the model is compiled"
    if config.trainer.sharding:
        return "the backbone is parted between processes"
    if config.backbone.quantization or quantised.names(model):
        return "the backbone is quantised"
    if config.backbone.device_map:
        return "the backbone is placed by a device_map"
    settings = model.config
    if any(getattr(settings, name, False) for name in ("output_hidden_states", "output_attentions", "output_router_logits")):
        return "the backbone's config asks for what is between its blocks"
    if delta_model.merged:
        return "the delta is merged into the weights"
    if not delta_model.trainable_parameters():
        return "nothing is trained"
    return None


def in_few(config: RunConfig, model: Any, norms: bool = True) -> InFew | None:
    """Have the backbone of a run compute norms and activations in few operations, if anything is to be left out at all."""
    trainer = config.trainer
    off = trainer.shortcuts == "off" or trainer.compile or trainer.sharding or not speed.settings.fused
    return None if off else InFew(model, norms)


def planned(config: RunConfig, delta_model: DeltaModel) -> list[str]:
    """Return sentences on what a run would leave out, as far as it can be told without weights and data."""
    model, result = delta_model.backbone_model, []
    few = in_few(config, model)
    if few is not None:
        few.remove()
        result += [f"Computed in few operations, norms on a CPU only: {few}."] * bool(few.kinds)
    why = refused(config, delta_model)
    if why is not None:
        return [*result, f"All is computed in every step: {why}."]
    found = frozen.find(model)
    if isinstance(found, str):
        result.append(f"No activations are kept over the epochs: {found}.")
    elif not config.trainer.activation_cache:
        result.append("No activations are kept over the epochs: trainer.activation_cache=0.")
    else:
        when = f"for evaluations only, as there is {found.random}" if found.random else "for training and evaluations"
        result.append(f"What {_blocks(found)} make of a text is computed once and kept over epochs and runs, {when}.")
    last = one_token.find(model, delta_model.attachments)
    if isinstance(last, LastBlock) and not config.trainer.gradient_checkpointing:
        when = f", in evaluations only, as there is {last.random}" if last.random else ""
        result.append(f"If the head reads the {last.read} token of a text only, the last block computes no other{when}.")
    return result


def _blocks(found: Frozen) -> str:
    total = len(found.blocks)
    return f"all {total} {found.kind}" if found.depth == total else f"the lowest {found.depth} of {total} {found.kind}"


class Shortcuts:
    """The shortcuts of a run, or of an evaluation, until the context that this is ends.

    Norms and activations are computed in few operations at once, and what depends on the delta and the data from `begin` on.

    Args:
        config: Its config.
        trainer: Its trainer.
        splits: The names of the splits that it uses; what is not ``train`` is only measured.
        base: The digest of the backbone without the delta.
    """

    def __init__(self, config: RunConfig, trainer: DeltaTrainer, splits: Sequence[str], base: str) -> None:
        self.config, self.trainer, self.base = config, trainer, base
        self.splits = {name: trainer.splits[name] for name in dict.fromkeys(splits)}
        self.delta_model: DeltaModel = trainer.delta_model
        self.model: Any = self.delta_model.backbone_model
        self.told: list[str] = []
        """Clauses on what is left out, and why not."""
        self.kept: dict[str, int] = {}
        """Bytes of activations, by the split that they are of."""
        self.shortcut: Shortcut | None = None
        self.one_token: OneToken | None = None
        self.in_few = in_few(config, self.model)
        self._first = next(iter(self.splits.values()))
        mixed = trainer.args.bf16 or trainer.args.fp16
        self._mixed = (torch.bfloat16 if trainer.args.bf16 else torch.float16) if mixed else None

    def facts(self) -> dict[str, Any]:
        """Return what is left out, for JSON."""
        return {
            "frozen_blocks": self.shortcut.frozen.depth if self.shortcut else 0,
            "while_training": bool(self.shortcut and self.shortcut.training),
            "kept_activations": self.kept,
            "in_few_operations": dict(self.in_few.kinds) if self.in_few else {},
            "last_block": f"{self.one_token.last.read} token" if self.one_token else "all tokens",
            "told": self.told,
        }

    def begin(self) -> None:
        """Find out what can be left out, try it out, compute the activations that are not there, and leave out from now on."""
        if self.in_few is not None and self.in_few.kinds:
            self.told.append(f"computed in few operations: {self.in_few}")
        why = refused(self.config, self.delta_model)
        if why is None and "input_ids" not in self._first.features.column_names:
            why = "the backbone takes no tokens"
        if why is not None:
            self.told.append(f"all is computed in every step: {why}")
            return
        last, found = one_token.find(self.model, self.delta_model.attachments), frozen.find(self.model)
        if not self.config.trainer.activation_cache:
            found = "trainer.activation_cache=0"
        if self.config.trainer.gradient_checkpointing:
            last = "its activations are computed twice"
        if isinstance(last, LastBlock) or isinstance(found, Frozen):
            was = self.model.training
            with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
                self.model.eval()
                try:
                    found = self._begin(last, found)
                finally:
                    self.model.train(was)
        if isinstance(found, str):
            self.told.append(f"no activations are kept: {found}")

    def __enter__(self) -> Shortcuts:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing out any more."""
        self.put_aside()

    def put_aside(self) -> None:
        """Leave nothing out until `take_up`."""
        for one in (self.shortcut, self.one_token, self.in_few):
            if one is not None:
                one.remove()

    def take_up(self) -> None:
        """Leave out again what was left out before `put_aside`."""
        for one in (self.shortcut, self.one_token, self.in_few):
            if one is not None:
                one.put()

    def _begin(self, last: LastBlock | str, found: Frozen | str) -> Frozen | str:
        """Begin with what stands the trial; return the frozen blocks, or a clause why their activations are not kept."""
        few, batch = self._few()
        expected = self._outcome(batch)
        if isinstance(last, LastBlock) and batch["input_ids"].shape[-1] > 1:
            self._begin_one_token(last, batch, expected)
        if isinstance(found, Frozen):
            found = self._tried(found, few, batch, expected)
        if isinstance(found, Frozen):
            self._keep(found)
        return found

    # Trying out

    def _few(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return a few training rows of different lengths, and the batch of them."""
        lengths = self._first.lengths or []
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        places = sorted({round(step * (len(order) - 1) / (ROWS - 1)) for step in range(ROWS)})
        few = self._first.features.select([order[place] for place in places])
        return few, self.trainer.kind.inputs(self.trainer._prepare_inputs(self.trainer.data_collator(list(few))))

    def _autocast(self) -> Any:
        return torch.autocast(self.model.device.type, self._mixed) if self._mixed else contextlib.nullcontext()

    def _outcome(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return what the model makes of a batch, but for padding, and in the end all gradients as one vector."""
        with self._autocast():
            outputs = self.model(**batch)
        values = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
        trained, mask = list(self.delta_model.trainable_parameters().values()), batch.get("attention_mask")
        found = torch.autograd.grad(outputs.get("loss", values[0].float().sum()), trained, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
        result = [
            value[mask.bool()] if mask is not None and value.shape[: mask.dim()] == mask.shape else value for value in values
        ]
        return [*(value.detach() for value in result), torch.cat([gradient.flatten().float() for gradient in gradients])]

    def _difference(self, batch: Mapping[str, torch.Tensor], expected: list[torch.Tensor]) -> str | None:
        """Return None if the model computes what is expected, to rounding, else say in a clause what it does."""
        try:
            found = self._outcome(batch)
        except NOT_COMPUTED as error:
            return f"the model does not compute without what would be left out ({_first_line(error)})"
        tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in [self._mixed, *(p.dtype for p in self.model.parameters())])
        for one, other in zip(found, expected, strict=True):
            largest = float(other.abs().max()) if other.numel() else 0.0
            if one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=0, atol=tolerance * largest):
                return "the model computes something else without what would be left out"
        return None

    def _begin_one_token(self, last: LastBlock, batch: Mapping[str, torch.Tensor], expected: list[torch.Tensor]) -> None:
        """Let the last block compute the token that the head reads only, if that comes to the same."""
        tried = OneToken(self.model, last)
        if self._difference(batch, expected) is not None:
            tried.remove()
            return
        if last.random is None:
            last.block.train()
            (*one, _), (*other, _) = self._outcome(batch), self._outcome(batch)
            last.block.eval()
            if not all(map(torch.equal, one, other)):  # what is random there is seen if it is not known
                tried.last = last = dataclasses.replace(last, random="something random in it")
        self.one_token = tried
        when = f" in evaluations; while training there is {last.random}" if last.random else ""
        self.told.append(f"the head reads the {last.read} token only, and the last block computes no other{when}")

    def _tried(self, found: Frozen, few: Any, batch: Mapping[str, torch.Tensor], expected: list[torch.Tensor]) -> Frozen | str:
        """Return frozen blocks if the model computes the same when it goes on from their activations, else a clause why not."""
        texts, device = Texts.of(few), self.model.device
        try:
            tokens = texts.batch(range(len(texts.rows)), device)
            values = self._compute(found, tokens)
            found.base.train()
            # What is random there is seen if it is not known.
            if found.random is None and not torch.equal(values, self._compute(found, tokens)):
                found = dataclasses.replace(found, random="something random in them")
        except NOT_COMPUTED as error:
            return f"the lower blocks cannot be computed by themselves ({_first_line(error)})"
        finally:
            found.base.eval()
        known, whole = Known(), values.new_empty(texts.tokens, values.shape[-1], device="cpu")
        for start, part in self._made_of(found, texts)():
            whole[start : start + len(part)] = part
        known.add(texts, whole)
        self._width, self._dtype = whole.shape[-1], whole.dtype
        shortcut = Shortcut(found, known.find, training=False)
        try:
            difference = self._difference(batch, expected)
        finally:
            shortcut.remove()
        if difference is None and not shortcut.used:
            return "batches are not made of the rows' own tokens, padded at their ends"
        return difference or found

    def _compute(self, found: Frozen, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the activations of a batch.

        Raises:
            ValueError: If the blocks hand on something else.
        """
        with self._autocast():
            values = found.block_inputs(tokens)
        if values is None:
            raise ValueError("they hand on more than hidden states")
        return values

    def _made_of(self, found: Frozen, texts: Texts) -> Callable[[], Iterator[tuple[int, torch.Tensor]]]:
        return lambda: activations.computed(texts, functools.partial(self._compute, found), self.model.device)

    def _keep(self, found: Frozen) -> None:
        """Compute the activations of all splits that are worth it, as far as they may take room, and go on from them."""
        known, limit = Known(), int(self.config.trainer.activation_cache * 2**30)
        folder, left = Folder(limit), limit
        training = found.random is None
        seen = self.trainer.args.max_steps * self.trainer.global_batch_size
        for name, split in self.splits.items():
            if name == "train":
                reason = f"{found.random} changes it" if not training else None
                if reason is None and seen < len(split.features):
                    reason = "it does not get through all rows"
                if reason is not None:
                    training = False
                    self.told.append(f"no activations are kept for training: {reason}")
                    continue
            elif isinstance(self.trainer.kind, DecoderText) and not isinstance(self.trainer.kind, Ranking):
                continue  # what is measured are generated texts, of which each step goes on from the cache of the last
            # Rows that are there twice count twice, so that of too many no more than their lengths is looked at.
            bytes_each, rows = self._width * self._dtype.itemsize, sum(split.lengths or [])
            texts = Texts.of(split.features) if rows * bytes_each <= left else None
            needed = (rows if texts is None else texts.tokens) * bytes_each
            if texts is None or needed > left:
                training = training and name != "train"
                self.told.append(
                    f"no activations are kept for {name}: they would take {needed / 2**30:.3g} GiB, and "
                    f"trainer.activation_cache={self.config.trainer.activation_cache:g} leaves {left / 2**30:.3g} GiB"
                )
                continue
            if not needed:
                continue
            name_of = {**self._depends(found), "texts": texts.digest()}
            with processes.main_first():
                try:
                    values = folder.get(name_of, (texts.tokens, self._width), self._dtype, self._made_of(found, texts))
                except OSError as error:
                    training = training and name != "train"
                    self.told.append(f"no activations are kept for {name}: {error.strerror or error}")
                    continue
            left -= needed
            self.kept[name] = needed
            known.add(texts, values)
            self.told.append(f"what {_blocks(found)} make of {name} is kept, {needed / 2**20:.1f} MiB")
        if self.kept:
            self.shortcut = Shortcut(found, known.find, training)

    def _depends(self, found: Frozen) -> dict[str, Any]:
        """Return what activations depend on to the last bit, beside the texts."""
        device = self.model.device
        return {
            "backbone": [type(self.model).__name__, self.base],
            "settings": self.model.config.to_json_string(use_diff=False),
            "attention": self.model.config._attn_implementation,
            "depth": found.depth,
            "precision": [str(self._dtype), str(self._mixed), _of_products()],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "speed": [self.config.trainer.speed, dataclasses.asdict(speed.settings)],
            "versions": [torch.__version__, transformers.__version__],
            "code": "".join(map(inspect.getsource, (frozen, activations, norms_and_gelus))),
            "in few operations": self.in_few is not None,
        }


def _of_products() -> str:
    """Return the precision of products in float32."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for single backends
        backends: Any = (torch.backends.cuda, torch.backends.mkldnn)
        return ", ".join(backend.matmul.fp32_precision for backend in backends)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
