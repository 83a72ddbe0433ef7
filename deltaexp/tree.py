"""The module tree of a backbone: its modules and tensors by name, the dimensions of its linear maps, its stacks of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from deltaexp.lazy import Layer
from deltaexp.quantised import library, parts, weight_library


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(in_dim, out_dim)`` of a linear map (Linear and its kin, transformers' Conv1D); None for others.

    The map is over the last dimension and happens in the module's own forward pass, so that hooks see it: grouped linears
    and the output projection of PyTorch's MultiheadAttention are none.
    """
    names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    in_dim, out_dim = (getattr(module, name, None) for name in names)
    if type(in_dim) is not int or type(out_dim) is not int or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    groups = [getattr(module, name, 1) for name in ("groups", "n_groups", "num_groups")]
    return None if any(isinstance(count, int) and count > 1 for count in groups) else (in_dim, out_dim)


def output_dim(module: nn.Module) -> int | None:
    """Return the size of the last dimension of what a leaf module returns; None where its type does not say."""
    linear = linear_dims(module)
    if linear:
        return linear[1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = getattr(module, "weight", None)
    # A weight that is a buffer is no more than a stand-in for a fused kernel, and its size need not be the output's.
    if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return weight.shape[0]
    return None


def backbone_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of a backbone in order, without the deltas that hang in it."""
    stack = [("", backbone)]
    while stack:
        name, module = stack.pop()
        yield name, module
        if module._modules:
            children = [
                (f"{name}.{child_name}" if name else child_name, child)
                for child_name, child in module.named_children()
                if not isinstance(child, Layer)
            ]
            stack.extend(reversed(children))


def backbone_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Return a backbone's own parameters, each once under its first name, without those of deltas."""
    result: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in backbone_modules(backbone):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                result[f"{prefix}.{name}" if prefix else name] = parameter
    return result


def backbone_tensors(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return what identifies a backbone: its own parameters, quantised ones in their parts, and its persistent buffers."""
    parameters = backbone_parameters(backbone)
    result: dict[str, torch.Tensor] = {name: p for name, p in parameters.items() if not library(p)}
    quantised = parameters.keys() - result.keys()
    for prefix, module in backbone_modules(backbone):
        if quantised and weight_library(module):
            result |= {f"{prefix}.{name}" if prefix else name: part for name, part in parts(module).items()}
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                result[f"{prefix}.{name}" if prefix else name] = buffer
    return result


def parent(name: str) -> str:
    """Return the name of the module that contains the one called ``name``; the root is called ""."""
    return name.rpartition(".")[0]


def leaf(name: str) -> str:
    """Return the last component of a name."""
    return name.rpartition(".")[2]


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that contains the one called ``name``, and its attribute's name there."""
    return model.get_submodule(parent(name)), leaf(name)


def above(name: str) -> Iterator[str]:
    """Yield ``name`` and the names of all modules that contain it, up to the root."""
    while name:
        yield name
        name = parent(name)
    yield ""


class Tree:
    """The modules of a backbone by name, and what is found below each of them."""

    def __init__(self, backbone: nn.Module) -> None:
        self.modules = dict(backbone_modules(backbone))
        self.children: dict[str, list[str]] = {name: [] for name in self.modules}
        for name in self.modules:
            if name:
                self.children[parent(name)].append(name)
        self.linears = {name: dims for name, module in self.modules.items() if (dims := linear_dims(module)) is not None}

    def kind(self, name: str) -> str:
        """Return the name of a module's class."""
        return type(self.modules[name]).__name__

    def below(self, name: str) -> Iterator[str]:
        """Yield the names of a module and of all modules in it, in order."""
        stack = [name]
        while stack:
            name = stack.pop()
            yield name
            stack.extend(reversed(self.children[name]))

    def count(self, names: Collection[str]) -> Counter[str]:
        """Return for every module how many of ``names`` it is or contains."""
        return Counter(ancestor for name in names for ancestor in above(name))

    def is_list(self, name: str) -> bool:
        """Say whether a module only holds others (ModuleList, ModuleDict) and is not called itself."""
        return isinstance(self.modules[name], (nn.ModuleList, nn.ModuleDict))

    def stacks(self, mixing: Collection[str], feeding: Collection[str], *, exact: bool) -> list[list[str]]:
        """Return the stacks of repeated blocks, each as the names of its blocks in order.

        A stack is a list of numbered modules, some of which are alike or hold both kinds of parts; of lists within lists
        the innermost for which that is true of all parts below: stages are left for their blocks, and a block's own lists
        (sublayers, experts) are none.

        Args:
            mixing: Names of the parts that mix tokens, such as attention.
            feeding: Names of the other parts of blocks, such as feed-forward projections.
            exact: Whether modules are alike only where their shapes are, as in convolutional nets; else one class is enough.
        """
        mixers, others = self.count(mixing), self.count(feeding)
        numbered = [name for name, names in self.children.items() if names and all(leaf(child).isdigit() for child in names)]
        complete: set[str] = set()
        repeated: set[tuple[str, str, str]] = set()
        for name in numbered:
            if any(mixers[child] and others[child] for child in self.children[name]):
                complete.add(name)
            if mixers[name] or others[name]:
                alike = Counter(self._signature(child) if exact else self.kind(child) for child in self.children[name])
                single = len(alike) == 1 and mixers[name] and self.is_list(name)
                if max(alike.values()) > 1 or single:
                    repeated.add(self._place(name))
        lists = set(numbered)

        def visit(name: str) -> list[list[str]]:
            inner = [stack for child in self.children[name] if mixers[child] or others[child] for stack in visit(child)]
            if name not in lists:
                return inner
            if inner and (name not in complete or any(parent(stack[0]) in complete for stack in inner)):
                covered = [block for stack in inner for block in stack]
                if sum(mixers[block] for block in covered) == mixers[name] and (
                    mixers[name] or sum(others[block] for block in covered) == others[name]
                ):
                    return self._joined(name, inner)
            if name in complete or self._place(name) in repeated:
                return [[child for child in self.children[name] if mixers[child] or others[child] or self.children[child]]]
            return inner

        return visit("")

    def _place(self, name: str) -> tuple[str, str, str]:
        """Return what the lists at the same place in modules of one kind have in common."""
        return self.kind(parent(name)), self.kind(name), leaf(name) if not leaf(name).isdigit() else ""

    def _joined(self, name: str, stacks: list[list[str]]) -> list[list[str]]:
        """Join the stacks of a list's stages into one; those of whole models in a list stay apart."""
        if any(hasattr(self.modules[below], "base_model_prefix") for below in self.below(name) if below != name):
            return stacks
        joined: dict[str, list[str]] = {}
        for stack in stacks:
            path = parent(stack[0]).removeprefix(name).lstrip(".")  # the stage's number, then where its blocks are
            joined.setdefault(path.partition(".")[2], []).extend(stack)
        return list(joined.values())

    def _signature(self, name: str) -> tuple:
        """Return what two modules must have in common to be the same block twice: classes, names and shapes."""
        result = []
        for below in self.below(name):
            module = self.modules[below]
            if "Drop" not in self.kind(below) and not isinstance(module, nn.Identity):
                shapes = tuple(tuple(p.shape) for p in module._parameters.values() if p is not None)
                result.append((below[len(name) :], type(module), shapes))
        return tuple(result)
