"""Layers of the PEFT library as delta layers.

PEFT puts a wrapper in the place of each module. Here it does so for a moment, which leaves everything to it that only it
knows: which modules, which layer for which module, how the weights start, what the layers share. The wrappers are then taken
out, the backbone is as before, and every wrapper becomes a child of the module that it wrapped, from which a hook calls it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaexp import addressing
from deltaexp.deltas.soft_prompt import PromptLayer, place_of
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError, did_you_mean, listing, unknown
from deltaexp.hooks import first_input
from deltaexp.lazy import Layer
from deltaexp.prompting import Place, place_name
from deltaexp.structure import backbone_modules, backbone_parameters

if TYPE_CHECKING:
    from deltaexp.deltas.peft import PeftConfig
    from deltaexp.targets import Site

ADAPTER = "default"
"""What PEFT calls the one adapter in each of its layers."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _library() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "delta_type=peft needs the PEFT library, which is not installed. Install it with: pip install 'deltaexp[peft]'"
        ) from error
    return peft


def _config(values: dict[str, Any]) -> Any:
    """Return PEFT's own config object.

    Raises:
        ConfigError: If PEFT has no such method or key, or refuses a value.
    """
    library = _library()
    method, known = values["peft_type"], library.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if method not in list(known):
        raise ConfigError(unknown("peft.peft_type", method, [kind.value for kind in known]))
    config_class = known[method]
    keys = [field.name for field in dataclasses.fields(config_class) if field.init]
    for key in values:
        if key not in keys:
            hint = did_you_mean(key, keys)
            raise ConfigError(f"PEFT's {method} has no key {key!r}.{hint} Its keys: {listing(sorted(keys), 60)}.")
    try:
        return config_class(**copy.deepcopy(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"PEFT refuses this config of {method}: {error}") from error


def expand(config: PeftConfig, name: str, module: nn.Module) -> list[str]:
    """Return the names of the places, for the module called ``name`` that was chosen or for the whole backbone.

    Where PEFT's own defaults were taken, they are written into the config.
    """
    settings = _config(config.peft)
    if settings.is_prompt_learning:
        return [place_name(name, module)]
    if config.modified_modules is not None:
        return [name]
    with torch.random.fork_rng(devices=[]):  # the layers that stay are made in `build`, and start as PEFT's would
        names = list(_wrappers(settings, module))
    if config.peft.get("target_modules") is None and isinstance(settings.target_modules, (set, list, tuple, str)):
        chosen = settings.target_modules
        named = {"target_modules": chosen if isinstance(chosen, str) else sorted(chosen)}
        config.peft = dict(sorted({**config.peft, **named}.items()))
    return names


def build(config: PeftConfig, site: Site) -> Layer:
    """Make the layer of one place; with the last one, PEFT makes what is in them all."""
    settings = _config(config.peft)
    if settings.is_prompt_learning:
        if not isinstance(settings.num_virtual_tokens, int) or settings.num_virtual_tokens < 1:
            raise ConfigError(
                f"peft.num_virtual_tokens is {settings.num_virtual_tokens!r}; PEFT's {config.peft['peft_type']} needs the "
                "number of vectors in front of the input, e.g. peft.num_virtual_tokens=20."
            )
        return PeftPromptLayer(settings, place_of(site, settings.num_virtual_tokens))
    layer = PeftLayer()
    layers: dict[str, tuple[PeftLayer, nn.Module]] = site.shared.setdefault("peft", {})
    layers[site.name] = layer, site.module
    if site.index == site.total - 1:
        assert site.backbone is not None
        if config.modified_modules is not None:
            settings.target_modules = "|".join(re.escape(name) for name in layers)
        wrappers = _wrappers(settings, site.backbone)
        if wrappers.keys() != layers.keys():
            raise AddressingError(
                f"PEFT's {config.peft['peft_type']} modifies {listing(list(wrappers), 4)}, where {listing(list(layers), 4)} "
                "was chosen. Name the modules in peft.target_modules instead of modified_modules."
            )
        for name, wrapper in wrappers.items():
            layers[name][0].adopt(wrapper, layers[name][1])
    return layer


def _wrappers(settings: Any, backbone: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, what PEFT puts in the places of modules; the backbone is afterwards as it was.

    Raises:
        AddressingError: If PEFT finds nothing or refuses, or if the method does more than wrapping modules.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    method = settings.peft_type.value
    for key in ("target_modules", "exclude_modules"):
        expression = getattr(settings, key, None)
        if isinstance(expression, str) and expression != "all-linear":
            # A hostile expression would keep PEFT searching for ever, so it is given the names that are meant.
            meant = [name for name, _ in backbone_modules(backbone) if addressing.search(expression, name, whole=True)]
            setattr(settings, key, "|".join(map(re.escape, meant)) if meant else re.escape(expression))
    tuner_class = _library().mapping.PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
    names = {module: name for name, module in backbone_modules(backbone)}
    children = {module: dict(module._modules) for module in names}
    result: dict[str, nn.Module] = {}
    originals: set[nn.Module | None] = set()
    with _as_before(backbone, method), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT sets it right itself
        try:
            tuner_class(backbone, settings, adapter_name=ADAPTER)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise AddressingError(f"PEFT cannot put {method} into this {type(backbone).__name__}: {error}") from error
        for parent, name in names.items():
            for child, wrapper in parent._modules.items():
                original = children[parent].get(child)
                if wrapper is original or isinstance(original, Layer):
                    continue
                full = f"{name}.{child}" if name else child
                fits = isinstance(wrapper, BaseTunerLayer) and getattr(wrapper, "base_layer", None) is original
                if not fits or isinstance(original, nn.MultiheadAttention):
                    raise AddressingError(
                        f"PEFT's {method} puts a {type(wrapper).__name__} in the place of {full!r}, a "
                        f"{type(original).__name__}, and this cannot hang on it as a delta. Leave that module out of "
                        "peft.target_modules."
                    )
                if original not in originals:  # a module under two names is one
                    assert wrapper is not None
                    originals.add(original)
                    result[full] = wrapper
    if not result:
        raise AddressingError(f"PEFT's {method} finds nothing to modify in this {type(backbone).__name__}.")
    for taken in result.values():
        del taken._modules["base_layer"]
    return result


@contextlib.contextmanager
def _as_before(backbone: nn.Module, method: str) -> Iterator[None]:
    """Within this context other deltas are hidden; afterwards every module and parameter is as before it.

    Raises:
        AddressingError: If the values of the backbone's own parameters were changed.
    """
    modules = [module for _, module in backbone_modules(backbone)]
    contents = [(module.__dict__, dict(module.__dict__)) for module in modules]
    tables = [(value, dict(value)) for _, kept in contents for value in kept.values() if isinstance(value, dict)]
    parameters = [(p, p.requires_grad, p.data) for p in backbone_parameters(backbone).values()]
    for module in modules:
        for name, child in list(module._modules.items()):
            if isinstance(child, Layer):
                del module._modules[name]
    changed = False
    try:
        yield
    finally:
        for table, kept in (*contents, *tables):
            table.clear()
            table.update(kept)
        for parameter, trainable, data in parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data, changed = data, True
            parameter.requires_grad_(trainable)
    if changed:
        raise AddressingError(
            f"With this config PEFT's {method} changes the backbone's own weights, so that it could not be taken out without a "
            "trace. Choose another initialisation, or delta_type=lora, which has the same ones as options."
        )


class PeftLayer(Layer):
    """A layer of PEFT for one module ``f``: its output ``f(x)`` becomes what PEFT's layer makes of ``x`` and ``f``.

    With other deltas ``g`` before it on the same module, whose output is then ``g(x)``, it becomes that plus
    ``g(x) - f(x)``.
    """

    def adopt(self, wrapper: nn.Module, module: nn.Module) -> None:
        """Take over what PEFT made for a module."""
        self.tuner = wrapper
        self.trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.tables = [
            key for key, table in vars(wrapper).items() if isinstance(table, dict) and _is_tensor(table.get(ADAPTER))
        ]
        """Where PEFT keeps tensors without registering them, such as the indices of sparse updates."""
        for key in self.tables:
            self.register_buffer(f"fixed_{key}", vars(wrapper)[key][ADAPTER])
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        self.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        self.train(module.training)

    def requires_grad_(self, requires_grad: bool = True) -> PeftLayer:
        """Make trainable what PEFT trains, or nothing."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name in self.trained)
        return self

    def connect(self, module: nn.Module, name: str) -> list[Any]:
        """Register the hook."""
        return [module.register_forward_hook(partial(call_tuner, name=name), with_kwargs=True)]

    def forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        """Return the new output of ``module``, which was called with ``args`` and ``kwargs`` and returned ``output``."""
        alone = getattr(module, _layer_of(next(iter(module._forward_hooks.values()))), None) is self
        plain = output if alone else module.forward(*args, **kwargs)
        x = first_input(args, kwargs)

        def known(inner: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            # Most methods ask for f(x), which is there; some for f of another input.
            return plain if inner is x else module.forward(inner, *args, **kwargs)

        base = copy.copy(module)  # shares the parameters, and has no hooks that would call this layer again
        base.__dict__.update({hooks: OrderedDict() for hooks in HOOKS}, forward=known)
        tuner: Any = self.tuner
        for key in self.tables:
            vars(tuner)[key][ADAPTER] = getattr(self, f"fixed_{key}")
        tuner.__dict__["base_layer"] = base
        try:
            result = tuner(*args, **kwargs)
        finally:
            del tuner.__dict__["base_layer"]
        return (result if alone else result + (output - plain)).to(output.dtype)


def call_tuner(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str) -> Any:
    """Forward hook: replace the module's output by what PEFT's layer makes of it."""
    if not isinstance(output, torch.Tensor):
        raise DeltaExpError(f"A PEFT layer hangs on a module that returns {type(output).__name__}; it needs a tensor.")
    return getattr(module, name)(module, args, kwargs, output)


class PeftPromptLayer(PromptLayer):
    """A prompt of PEFT's, in front of the input's embeddings like any soft prompt.

    Args:
        settings: PEFT's config of it.
        place: Where it goes.
    """

    def __init__(self, settings: Any, place: Place) -> None:
        super().__init__(settings.num_virtual_tokens, place)
        settings.token_dim = settings.token_dim or place.weight.shape[1]
        settings.num_transformer_submodules = 1
        if getattr(settings, "encoder_hidden_size", 0) is None:
            settings.encoder_hidden_size = settings.token_dim
        encoder_class = _library().mapping.PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
        embeddings: Any = place.module
        needs = [embeddings.get_input_embeddings()] if settings.peft_type == "PROMPT_TUNING" else []
        self.encoder = encoder_class(settings, *needs)

    def prompt(self) -> torch.Tensor:
        """Return the vectors, shape ``(P, dim)``."""
        device = next(self.encoder.parameters()).device
        return self.encoder(torch.arange(self.tokens, device=device).unsqueeze(0))[0]


def _layer_of(hook: Any) -> str:
    """Return the name of the layer that a hook is for; of a hook that is none of deltaexp's, an empty one."""
    return getattr(hook, "keywords", {}).get("name", "")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
