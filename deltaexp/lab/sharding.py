"""A backbone whose frozen parameters are parted between processes by PyTorch's fully_shard (FSDP2), and put together again.

What is trained is small: it stays whole in every process, and its gradients are averaged (see `deltaexp.lab.parallel`). So
the optimizer, the delta's type and the checkpoints see the tensors that they see in one process. A block's parameters are
gathered while it computes; the peak is the parts of all blocks and one whole block. Zhao et al., 2023
(https://arxiv.org/abs/2304.11277) describe the method.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import distributed, nn

from deltaexp.errors import ConfigError
from deltaexp.lab import processes
from deltaexp.model import DeltaModel
from deltaexp.structure import blocks

MANAGED = "_is_fsdp_managed_module"
"""What transformers looks for in a model whose processes must generate in step."""


def shard(delta_model: DeltaModel, cpu: bool) -> None:
    """Part the frozen parameters of a backbone between the processes, block by block, and the rest with the whole.

    Args:
        delta_model: The delta, attached and frozen as it is trained; its layers stay whole.
        cpu: Whether to stay on the CPU where there are GPUs.

    Raises:
        ConfigError: If there is nothing to part, or this PyTorch cannot do it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = delta_model.backbone_model
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(f"trainer.sharding=fsdp needs PyTorch 2.7 or newer; this is {torch.__version__}.")
    whole = {p for p in model.parameters() if p.requires_grad}
    for attachment in delta_model.attachments:
        whole |= set(attachment.layer.parameters())
    parted = [p for p in model.parameters() if p not in whole]
    if not parted:
        raise ConfigError(
            "trainer.sharding=fsdp parts what is frozen between the processes, and here nothing is: all of the backbone is "
            "trained. Take another delta type, or leave trainer.sharding out."
        )
    odd = sorted({str(p.dtype).removeprefix("torch.") for p in parted if not p.is_floating_point()})
    if odd or getattr(model, "quantization_method", None) is not None:
        raise ConfigError("trainer.sharding=fsdp cannot part a backbone whose weights are quantised. Leave one of the two out.")
    kind = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    mesh = init_device_mesh(kind, (processes.count(),))
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    for stack in blocks(model):
        for name in stack:
            fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    setattr(model, MANAGED, True)
    # By its class's name transformers knows whether labels are to be shifted, and fully_shard gives it another one.
    own_name = type(model).__bases__[1].__name__
    model._get_name = lambda: own_name  # type: ignore[method-assign]
    for parameter in (p for p in model.parameters() if p in whole):  # in an order that is the same everywhere
        parameter.data = parameter.data.to(device)
        distributed.broadcast(parameter.data, src=0)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Say whether a backbone is parted between processes."""
    return bool(model.__dict__.get(MANAGED, False))


def put_together(model: Any) -> None:
    """Make the backbone in the first process an ordinary one again, on the CPU; all processes must call this.

    In the others it is of no use from then on.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in found:  # what is tied is gathered once
                    tensor = parameter.full_tensor()
                    found[id(parameter)] = nn.Parameter(tensor.cpu() if processes.is_main() else tensor[:0], False)
                if processes.is_main():
                    module._parameters[name] = found[id(parameter)]
    if not processes.is_main():
        return
    for module in sharded:
        state: Any = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.__class__ = type(module).__bases__[1]  # fully_shard derives a class from FSDPModule and the module's own
    for name in ("generate", "_get_name", MANAGED):
        model.__dict__.pop(name, None)
    model.to("cpu")
