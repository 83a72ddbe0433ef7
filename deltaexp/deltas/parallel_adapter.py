"""Adapters in parallel with a part of a block (He et al., 2022, https://arxiv.org/abs/2110.04366)."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from deltaexp.deltas.adapter import ACTIVATIONS, bottleneck
from deltaexp.errors import AddressingError, DeltaExpError
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class ParallelAdapterConfig(DeltaConfig):
    """A parallel adapter adds ``scaled * up(act(down(x)))`` to the output of one module, where x is the input of another."""

    delta_type: str = "parallel_adapter"
    bottleneck_dim: int = 24
    """Width of the bottleneck."""
    non_linearity: str = "gelu_new"
    """Activation between the two projections, by its name in transformers."""
    scaled: Optional[float] = None
    """What the adapter's output is multiplied by; null means 1."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn", "attn", "ff.w1", "ff.w2")
    attribute: ClassVar[str] = "parallel_adapter"
    paired: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-4
    """He et al., 2022, take one rate for all types they compare, 1e-4 on GLUE and 5e-5 on XSum (appendix A; so do their
    scripts). This is `adapter`'s, for the same reason: the layers are the same, at other places."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("bottleneck_dim", at_least=1)
        self.require_one_of("non_linearity", ACTIVATIONS)

    def build(self, site: Site) -> ParallelAdapterLayer:
        """Make the layer for a pair of modules: the one that gives the input, and the one whose output is added to.

        Raises:
            AddressingError: If the widths are not known.
        """
        from deltaexp.structure import linear_dims

        assert site.after is not None
        name, module = site.after
        dims = linear_dims(site.module)
        in_dim = dims[0] if dims else stream_width(site, self.delta_type)
        out_dim = stream_width(dataclasses.replace(site, name=name, module=module), self.delta_type, leaving=True)
        return ParallelAdapterLayer(in_dim, self.bottleneck_dim, out_dim, self.non_linearity, self.scaled)


def stream_width(site: Site, delta_type: str, leaving: bool = False) -> int:
    """Return the width of what enters a block or a part of one, or leaves it: the backbone's hidden size as a rule.

    In a backbone in stages the config tells another stage's width; there it is the one that most linear maps inside read, and
    for what leaves the one that the last of them makes: Hiera's blocks between stages and Zamba2's attention change the width.

    Raises:
        AddressingError: If it is not known.
    """
    from deltaexp.structure import linear_dims, output_dim

    if isinstance(site.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise AddressingError(
            f"The delta type {delta_type!r} goes on modules with features in the last dimension, and {site.name!r} is a "
            f"{type(site.module).__name__}. Name other modules in modified_modules, or take the delta type 'adapter'."
        )
    own = output_dim(site.module)
    if own is not None:
        return own
    maps = [dims for module in site.module.modules() if (dims := linear_dims(module))]
    if maps and site.hidden_size not in (maps[0][0], usual := statistics.mode(reads for reads, _ in maps)):
        return maps[-1][1] if leaving else usual
    if site.hidden_size is None:
        raise AddressingError(
            f"The delta type {delta_type!r} needs to know the width of {site.name!r}, which neither the "
            f"{type(site.module).__name__} nor the backbone's config tells. Name Linear modules in modified_modules."
        )
    return site.hidden_size


class ParallelAdapterLayer(Layer):
    """The bottleneck beside a part of a block: ``after(...) + s * (W_up act(W_down x + b_down) + b_up)``.

    ``x`` is the input of the module that the layer hangs on, shape ``(..., in_dim)``, and ``after(...)`` the output of that
    module or of a later one, shape ``(..., out_dim)``. The weights start at N(0, 0.01^2) and the biases at zero, so that the
    result starts close to zero.

    Args:
        in_dim: Size of the last dimension of ``x``.
        bottleneck_dim: Width between the two projections.
        out_dim: Size of the last dimension of the output.
        non_linearity: Name of the activation in transformers.
        scaled: The factor s; None means 1.
    """

    tokenwise = True

    def __init__(self, in_dim: int, bottleneck_dim: int, out_dim: int, non_linearity: str, scaled: float | None = None) -> None:
        super().__init__()
        self.scaled = 1.0 if scaled is None else scaled
        self.modulelist = bottleneck(in_dim, bottleneck_dim, out_dim, non_linearity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to what is added, shape ``(..., out_dim)``."""
        return self.modulelist(x) * self.scaled

    def connect(self, module: nn.Module, name: str, after: nn.Module) -> list[Any]:
        """Take the input of ``module``, on which the layer hangs as ``name``, and add to the output of ``after``."""
        from deltaexp.hooks import add_parallel

        if after is module:
            hook = partial(add_parallel, name=name, rows=None)
            return [module.register_forward_hook(hook, with_kwargs=True)]
        passing = Passing()
        give = partial(keep_input, name=name, passing=passing)
        take = partial(add_from_kept, passing=passing, order=self.order)
        return [
            module.register_forward_pre_hook(give, with_kwargs=True),
            after.register_forward_hook(take, with_kwargs=True),
        ]


class Passing(dict):
    """What one hook hands to another within a forward pass: by device, as each replica of DataParallel has its own.

    Both hooks hold the same one, which copy and pickle preserve, and the copy is empty: a forward pass that broke off leaves
    behind tensors that cannot be copied.
    """

    def __reduce__(self) -> tuple:
        """Leave the content out."""
        return Passing, ()


def keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, name: str, passing: Passing) -> None:
    """Forward pre-hook of the first module: keep what it is given."""
    from deltaexp.hooks import first_input

    x = first_input(args, kwargs)
    passing[x.device] = module, name, x


def add_from_kept(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, passing: Passing, order: int) -> Any:
    """Forward hook of the second module: add what the layer makes of the first one's input.

    Raises:
        DeltaExpError: If the first module has not been called before.
    """
    from deltaexp.hooks import add_parallel, first_input

    device = first_input(args, kwargs).device
    if not passing:
        raise DeltaExpError(
            f"A parallel adapter adds to the output of a {type(module).__name__}, and the module whose input it takes was not "
            "called before that. Name pairs in modified_modules of which the first is called before the second."
        )
    # Taken out before it is used: gradient checkpointing breaks off its second pass once it has what it needs.
    first, name, x = passing.pop(device, None) or passing.popitem()[1]
    return add_parallel(first, (x,), {}, output, name=name, rows=None)
