"""Folding a delta into the weights of its backbone, and taking it out again bit for bit.

A merged delta costs nothing at inference: ``W' x + b'`` is computed in place of ``W x + b`` and the layer. The fold is made in
float64 and rounded once, to the weight's dtype; what that rounding does to the outputs is measured, not assumed.

What cannot be folded exactly (see `deltaexp.folding`) is refused, and then nothing has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaexp import surgery
from deltaexp.errors import DeltaExpError, listing
from deltaexp.folding import check, check_parameter, merged, rows_of
from deltaexp.hooks import OUTPUT_HOOKS, add_input
from deltaexp.ownership import OWNED, assign, originals
from deltaexp.structure import backbone_parameters, linear_dims
from deltaexp.surgery import Attachment
from deltaexp.targets import linear_weight, replaced, taken

if TYPE_CHECKING:
    from deltaexp.model import DeltaModel

MERGED = "_deltaexp_merged"
"""Attribute of a backbone: the names of its parameters that deltas are merged into. What they were is with what is owned."""
PROBES = 64
"""Number of random inputs on which each module is measured."""


@dataclass(frozen=True)
class Difference:
    """How far an output after the merge is from the one before it."""

    where: str
    absolute: float
    """The largest difference of two elements."""
    relative: float
    """The same as a fraction of the largest element before the merge."""

    @classmethod
    def between(cls, where: str, before: torch.Tensor, after: torch.Tensor) -> Difference:
        """Measure the difference of two tensors."""
        before, after = before.detach().to("cpu", torch.float64), after.detach().to("cpu", torch.float64)
        absolute, size = (after - before).abs().max().item(), before.abs().max().item()
        return cls(where, absolute, absolute / size if size else absolute)


@dataclass
class MergeReport:
    """What a merge has done, and its measured error; ``str()`` of it is a text for people."""

    layers: int
    """How many layers were folded."""
    dtypes: tuple[str, ...]
    """The dtypes of the weights that they were folded into."""
    modules: list[Difference] = field(default_factory=list)
    """For every module, on random inputs: its output with the layers against its output with the new weight."""
    logits: Difference | None = None
    """The same of the backbone's logits, where inputs were given."""

    @property
    def worst(self) -> Difference | None:
        """The module with the largest relative difference."""
        return max(self.modules, key=lambda difference: difference.relative, default=None)

    def __str__(self) -> str:
        into = f" of dtype {listing(self.dtypes)}" if self.dtypes else ""
        lines = [f"Merged {self.layers} layers into the weights of {len(self.modules)} modules{into}."]
        measured = [("module outputs", self.worst), ("logits", self.logits)]
        for what, difference in measured:
            if difference is not None:
                where = f" (at {difference.where})" if difference is self.worst else ""
                lines.append(f"  {what}: off by at most {difference.absolute:.2g}, relative {difference.relative:.2g}{where}")
        return "\n".join(lines)


@dataclass
class Merge:
    """What a delta that is merged keeps: the values it has overwritten, and the report."""

    originals: dict[str, torch.Tensor]
    report: MergeReport


def merge(delta_model: DeltaModel, inputs: Mapping[str, Any] | None = None) -> MergeReport:
    """Fold the layers of a delta into its backbone and take them out of the module tree (see `DeltaModel.merge`).

    Args:
        delta_model: The delta.
        inputs: A batch for the backbone, by keywords, on which the logits are compared.

    Raises:
        DeltaExpError: If a layer cannot be folded; then nothing has changed.
    """
    if delta_model.merge_record is None:
        was_attached = delta_model.attached
        delta_model.attach()
        try:
            delta_model.merge_record = _merge(delta_model, inputs)
        except BaseException:
            if not was_attached:
                delta_model.detach()
            raise
    return delta_model.merge_record.report


def _merge(delta_model: DeltaModel, inputs: Mapping[str, Any] | None) -> Merge:
    """Merge a delta that is attached."""
    backbone = delta_model.backbone_model
    groups: dict[nn.Module, list[Attachment]] = {}
    for attachment in delta_model.attachments:
        groups.setdefault(attachment.module, []).append(attachment)
    for module, own in groups.items():
        check(module, own)
    names = {id(parameter): name for name, parameter in backbone_parameters(backbone).items()}
    result = Merge({}, MergeReport(len(delta_model.attachments), _dtypes(groups)))
    with torch.no_grad(), _evaluating(backbone):
        before = None if inputs is None else _logits(backbone(**inputs))
        removed = False
        try:
            for module, own in groups.items():
                result.report.modules.append(_fold(module, own, names, result.originals, backbone))
            surgery.remove(delta_model.attachments)
            removed = True
            if inputs is not None and before is not None:
                result.report.logits = Difference.between("the backbone", before, _logits(backbone(**inputs)))
        except BaseException:
            assign(backbone_parameters(backbone), result.originals)
            if removed:
                surgery.insert(delta_model.attachments)
            raise
    _record(backbone, MERGED, merged_names(backbone) | set(result.originals))
    _record(backbone, OWNED, {**originals(backbone), **result.originals})
    return result


def unmerge(delta_model: DeltaModel) -> None:
    """Take a merged delta out of the weights and put its layers in; nothing where it is not merged.

    Raises:
        DeltaExpError: If something else hangs now where a layer was; then the delta stays merged.
    """
    if delta_model.merge_record is None:
        return
    surgery.insert(delta_model.attachments)
    restore(delta_model)


def restore(delta_model: DeltaModel) -> None:
    """Give the backbone the values back that the merge of a delta has overwritten."""
    if delta_model.merge_record is None:
        return
    backbone, mine = delta_model.backbone_model, delta_model.merge_record.originals
    assign(backbone_parameters(backbone), mine)
    _record(backbone, MERGED, merged_names(backbone) - set(mine))
    _record(backbone, OWNED, {name: value for name, value in originals(backbone).items() if name not in mine})
    delta_model.merge_record = None


def merged_names(backbone: nn.Module) -> set[str]:
    """Return the names of the backbone's parameters that deltas are merged into."""
    return backbone.__dict__.get(MERGED, set())


def _fold(
    module: nn.Module,
    own: Sequence[Attachment],
    names: Mapping[int, str],
    kept: dict[str, torch.Tensor],
    backbone: nn.Module,
) -> Difference:
    """Fold layers into their module, adding what is overwritten to ``kept``, and return the measured difference."""
    probe = _probe(module)
    before = _with_layers(module, own, probe)
    parameters: dict[str, Any] = {"weight": module.weight, "bias": getattr(module, "bias", None)}
    exact = torch.float32 if module.weight.device.type == "mps" else torch.float64
    weight, bias = linear_weight(module).to(exact), None if parameters["bias"] is None else parameters["bias"].to(exact)
    after_weight = sorted((a for a in own if a.layer.insertion != "input"), key=lambda a: a.layer.order)
    before_weight = sorted((a for a in own if a.layer.insertion == "input"), key=lambda a: -a.layer.order)
    for attachment in (*after_weight, *before_weight):
        rows = rows_of(attachment)
        part = None if bias is None else taken(bias, rows)
        new, new_part = merged(attachment.layer, taken(weight, rows, dim=0), part)
        # `replaced` works on the last dimension, which the weight's rows are in its transpose.
        weight = new if rows is None else replaced(weight.T, rows, new.T).T
        if (new_part is None) != (part is None):
            raise DeltaExpError(
                f"{attachment.prefix!r} cannot be merged: it would need the module {attachment.site!r} to have a bias, and "
                "that has none."
            )
        bias = new_part if bias is None or new_part is None else replaced(bias, rows, new_part)
    values = {"weight": weight.T if type(module).__name__ == "Conv1D" else weight, "bias": bias}
    for name, value in values.items():
        parameter = parameters[name]
        if parameter is None or value is None or (name == "bias" and torch.equal(value, parameter.to(exact))):
            continue
        rounded = value.to(parameter.dtype)
        if not torch.isfinite(rounded).all():
            raise DeltaExpError(
                f"The delta cannot be merged into {own[0].site!r}: its new {name} is not finite in {parameter.dtype}. Use the "
                "delta without merging it, or load the backbone in a wider dtype."
            )
        full = names[id(parameter)]
        check_parameter(backbone, module, full, parameter)
        kept[full] = parameter.detach().to("cpu", copy=True)
        parameter.copy_(rounded)
    return Difference.between(own[0].site, before, _with_layers(module, [], probe))


def _probe(module: nn.Module) -> torch.Tensor:
    """Return random inputs for a linear map, the same ones every time."""
    weight: Any = module.weight
    dims = linear_dims(module)
    if dims is not None:
        shape: tuple[int, ...] = (PROBES, dims[0])
    else:
        convolution: Any = module
        reach = (1 + d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True))
        shape = (2, convolution.in_channels, *(size + 3 for size in reach))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return x.to(weight.device, weight.dtype)


def _with_layers(module: nn.Module, own: Sequence[Attachment], x: torch.Tensor) -> torch.Tensor:
    """Return the module's output with some of its layers, and without whatever else hooks into it."""
    if any(attachment.layer.connect is not None for attachment in own):
        return module(x)  # it is alone on the module
    ordered = sorted(own, key=lambda attachment: attachment.layer.order)
    for attachment in ordered:
        if attachment.layer.insertion == "input":
            (x,) = add_input(module, (x,), {}, name=attachment.attribute)[0]
    h = module.forward(x)  # past the hooks
    for attachment in ordered:
        if attachment.layer.insertion != "input":
            hook = OUTPUT_HOOKS[attachment.layer.insertion]
            h = hook(module, (x,), {}, h, name=attachment.attribute, rows=attachment.rows)
    return h


def _dtypes(groups: Mapping[nn.Module, Sequence[Attachment]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(linear_weight(module).dtype).removeprefix("torch.") for module in groups))


def _logits(output: Any) -> torch.Tensor:
    """Return what a backbone's output is compared by: the logits, or the first tensor of it."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else _logits(output[0])


def _record(backbone: nn.Module, attribute: str, values: Any) -> None:
    """Keep values with the backbone, so that a copy of it knows as well; without any, nothing is left behind."""
    if values:
        backbone.__dict__[attribute] = values
    else:
        backbone.__dict__.pop(attribute, None)


@contextlib.contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Within this context nothing of the backbone drops out; afterwards every module is in the mode it was in."""
    training = [module for module in backbone.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
