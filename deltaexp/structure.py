"""The common structure of a transformers backbone, found from its module tree; there is no table of models.

What is looked at are lists of repeated blocks, kinds of modules, shapes, and the field's names for projections:

1. A module that directly holds query, key and value projections (also fused, or fewer of them where its name or class says
   that it is attention) is an attention. ``attn`` is the highest module in a block that contains this attention, no other
   and no feed-forward projection. ``attn.q``, ``attn.k``, ``attn.v`` are the projections (of low-rank pairs the second),
   ``attn.proj`` is what leads out: by name, else by shape. Where the path below the stack or the class says "cross" (or
   "encoder_attn", "EncDec"), it is ``crossattn``. A fused projection has several roles, each with the `Rows` that are its
   own, or with None for the whole where that is not certain (see `deltaexp.layout`).
2. ``ff.w1`` (up), ``ff.gate``, ``ff.w2`` (down) are linear modules of a block outside attention, by their names; by shape
   where a module leads into a ``w2``, or a block has but one pair of opposite shapes. A ``w1`` twice as wide as its ``w2``
   is gate and up. ``ff`` is the highest module in a block that contains a feed-forward and no attention. Of a mixture of
   experts, ``ff.experts`` is a module that holds the experts' three-dimensional tensors, ``ff.router`` what chooses them.
3. Another module of a block with a projection out of it is a ``mixer`` (state space, recurrence, gated convolution):
   ``mixer.in`` are its projections from the width that ``mixer.out`` leads to.
4. Where a backbone has none of these, ``conv`` are the ungrouped convolutions of its blocks.
5. ``layer_norm`` are normalisations with parameters, ``embedding`` the embeddings outside blocks, ``lm_head`` what
   ``get_output_embeddings`` of any module returns, ``head`` the linear modules after the last block that are neither part
   of a base model nor of a pooler.

``blocks`` are lists of numbered modules that are alike or hold both attention and feed-forward, the innermost such ones.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

from torch import nn

from deltaexp.layout import Rows, fused_rows
from deltaexp.naming import CROSS, FUSED, NORM, WRAPPED, feed_forward_role, leads_out, letters, words
from deltaexp.tree import (
    Tree,
    above,
    backbone_modules,
    backbone_parameters,
    backbone_tensors,
    leaf,
    linear_dims,
    output_dim,
    parent,
)

__all__ = [
    "Role",
    "Rows",
    "backbone_modules",
    "backbone_parameters",
    "backbone_tensors",
    "blocks",
    "common_names",
    "common_structure",
    "linear_dims",
    "output_dim",
]


@dataclass(frozen=True)
class Role:
    """What a module is in the common structure.

    ``rows`` says which elements of a fused projection's output have this role; None means the whole output.
    """

    name: str
    rows: Rows | None = None


def common_structure(backbone: nn.Module) -> dict[str, tuple[Role, ...]]:
    """Return the roles of the modules that have any, by the modules' names, in the backbone's order."""
    found = _Finder(backbone)
    return {name: tuple(found.roles[name]) for name in found.tree.modules if name in found.roles}


def common_names(backbone: nn.Module) -> dict[str, list[str]]:
    """Return, for the modules that have any, their names in the common structure."""
    return {name: [role.name for role in roles] for name, roles in common_structure(backbone).items()}


def blocks(backbone: nn.Module) -> list[list[str]]:
    """Return the stacks of repeated blocks (encoder, decoder, vision tower, ...), each as its blocks' names in order.

    The blocks of a backbone in stages, such as Swin, are one stack.
    """
    return _Finder(backbone).stacks


class _Finder:
    """The rules of the module docstring, applied in their order."""

    def __init__(self, backbone: nn.Module) -> None:
        self.tree = Tree(backbone)
        self.roles: dict[str, list[Role]] = {}
        self._layouts: dict[tuple, dict[str, Rows] | None] = {}
        self.experts = self._experts()
        self.routers = self._routers()
        self.norms = {name for name in self.tree.modules if NORM.search(self.tree.kind(name))}
        aside = {*self.routers, *self.norms, *(name for name in self.tree.modules if "adapter" in leaf(name).lower())}
        self.linears = {n: dims for n, dims in self.tree.linears.items() if aside.isdisjoint(above(n))}
        self.attention = self._attention()
        named = {name: role for name in self.linears if (role := self._feed_forward(name))}
        ways_in = {n for n, role in named.items() if role != "ff.w2" and self.attention.keys().isdisjoint(above(n))}
        mixers = self._mixers(set(named))
        convs = [n for n, m in self.tree.modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d)) and m.groups == 1]
        feeding = {*ways_in, *self.experts}
        plain = not (self.attention or mixers or feeding)
        self.stacks = self.tree.stacks(convs if plain else {*self.attention, *mixers}, feeding, exact=plain)
        self.block = {name: block for stack in self.stacks for block in stack for name in self.tree.below(block)}

        self.holds_mixing = self.tree.count({*self.attention, *mixers})
        self.holds_feeding = self.tree.count({*feeding, *self.routers})
        # PyTorch's MultiheadAttention outside blocks pools what the blocks have made.
        regions = {name: self._region(name) for name, parts in self.attention.items() if parts or name in self.block}
        for container, region in regions.items():
            self._give_attention(container, region)
        taken = set(regions.values())
        self._give_mixers({name: parts for name, parts in mixers.items() if taken.isdisjoint(above(name))})
        taken.update(mixers)
        self.experts = {name for name in self.experts if taken.isdisjoint(above(name))}
        self.routers = {name for name in self.routers if taken.isdisjoint(above(name))}
        self.free = [n for n in self.linears if n in self.block and taken.isdisjoint(above(n))]
        self._give_feed_forward(named)
        for name in convs if plain else ():
            if name in self.block or not self.stacks:
                self._give(name, "conv")
        self._give_rest()

    def _give(self, name: str, role: str, rows: Rows | None = None) -> None:
        roles = self.roles.setdefault(name, [])
        if Role(role, rows) not in roles:
            roles.append(Role(role, rows))

    # Mixtures of experts

    def _experts(self) -> set[str]:
        """Return the modules that hold the tensors of all experts, ways in and out; one with one of the two maps is none."""
        return {
            name
            for name, module in self.tree.modules.items()
            if any(p is not None and p.dim() == 3 for p in module._parameters.values())
            and "expert" in (leaf(name) + self.tree.kind(name)).lower()
        }

    def _routers(self) -> set[str]:
        """Return the modules that choose experts or weigh them; nothing inside them has a role of its own."""
        found: set[str] = set()
        for names in self.tree.children.values():
            siblings = {leaf(child).lower() for child in names}
            mixture = not siblings.isdisjoint({"experts", "router"}) or not self.experts.isdisjoint(names)
            for child in names:
                label = leaf(child).lower()
                kind = self.tree.kind(child)
                if (mixture and label in ("gate", "router", "shared_expert_gate")) or re.search("Router$|Gating$", kind):
                    found.add(child)
        return {name for name in found if found.isdisjoint(above(parent(name)))}

    # Attention

    def _label(self, name: str) -> tuple[str, str]:
        """Return the module whose code calls a linear module, and what it calls it there."""
        if leaf(name) in WRAPPED and len(self.tree.children[parent(name)]) <= 2 and not self.tree.is_list(parent(name)):
            return parent(parent(name)), leaf(parent(name))
        return parent(name), leaf(name)

    def _attention(self) -> dict[str, dict[str, str]]:
        """Return the modules that hold query, key and value projections: for each, what its projections make."""
        found: dict[str, dict[str, str]] = {}
        unclear: dict[str, list[str]] = {}
        for name in self.linears:
            container, label = self._label(name)
            if label in FUSED:
                unclear.setdefault(container, []).append(name)
            elif made := letters(label):
                found.setdefault(container, {})[name] = made
        for container, names in unclear.items():
            if self._attentive(container):
                rest = "kv" if "q" in found.get(container, {}).values() else "qkv"
                found.setdefault(container, {}).update(dict.fromkeys(names, rest))
        for name, module in self.tree.modules.items():
            if isinstance(module, nn.MultiheadAttention):
                found[name] = {}
        self.channel_mix = {name: parts for name, parts in found.items() if self._mixes_channels(name, parts)}
        accepted = {
            name: parts
            for name, parts in found.items()
            if name not in self.channel_mix
            and (not parts or set("qkv") <= set("".join(parts.values())) or (self._attentive(name) and self._some(parts)))
        }
        result = {n: parts for n, parts in accepted.items() if not n or accepted.keys().isdisjoint(above(parent(n)))}
        self.nested = found.keys() - result.keys()
        return result

    @staticmethod
    def _some(parts: dict[str, str]) -> bool:
        made = set("".join(parts.values()))
        return "q" in made or {"k", "v"} <= made

    def _attentive(self, name: str) -> bool:
        return "att" in (leaf(name) + self.tree.kind(name)).lower()

    def _mixes_channels(self, container: str, parts: dict[str, str]) -> bool:
        """Say whether key and value are the two layers of a feed-forward, as in RWKV: value reads what key makes."""
        made = {what: self.linears[name] for name, what in parts.items()}
        if not {"k", "v"} <= made.keys():
            return False
        stated = re.search("feed_?forward|ffn|mlp", leaf(container) + self.tree.kind(container), re.IGNORECASE)
        return made["v"][0] == made["k"][1] != made["k"][0] or stated is not None

    def _region(self, container: str) -> str:
        """Return the highest module in the container's block that contains this attention or mixer and nothing else."""
        region = name = container
        block = self.block.get(container, "")
        while name != block and parent(name) != block:
            name = parent(name)
            if self.holds_mixing[name] > 1 or self.holds_feeding[name]:
                break
            if not self.tree.is_list(name):
                region = name
        return region

    def _give_attention(self, container: str, region: str) -> None:
        block = self.block.get(container)
        path = container[len(parent(parent(block))) :] if block else ".".join(container.split(".")[-2:])
        prefix = "crossattn" if CROSS.search(path) or CROSS.search(self.tree.kind(container)) else "attn"
        self._give(region, prefix)
        parts = self.attention[container]
        for name, made in parts.items():
            label = self._label(name)[1]
            fused = len(made) > 1 or "gate" in words(label)
            rows = self._rows(name, tuple(made)) if fused else None
            for letter in made:
                self._give(name, f"{prefix}.{letter}", rows[letter] if rows else None)
        others = [n for n in self.tree.below(region) if n in self.linears and n not in parts and self._own(n, container)]
        ways_out = [name for name in others if self._leads_out(name, container, region)]
        if not ways_out and parts:
            width = self.linears[next(iter(parts))][0]
            ways_out = [name for name in others if self.linears[name][1] == width][-1:]
        for name in ways_out:
            self._give(name, f"{prefix}.proj")

    def _own(self, name: str, container: str) -> bool:
        """Say whether a linear module is the attention's own, not that of an indexer or the like inside it."""
        return not any(a in self.nested for a in above(parent(name)) if a.startswith(f"{container}."))

    def _leads_out(self, name: str, container: str, region: str) -> bool:
        if leaf(name) in WRAPPED and parent(name) in (container, region):
            return True
        labels = {leaf(name), self._label(name)[1]} - WRAPPED
        return any(leads_out(label, leaf(name) in WRAPPED) for label in labels)

    def _rows(self, name: str, parts: tuple[str, ...]) -> dict[str, Rows] | None:
        """Return the rows of each part of a fused projection, worked out once for all modules that are set up alike."""
        container, label = self._label(name)
        owner = self.tree.modules[container]
        flags = tuple(
            (key, value) for key, value in vars(owner).items() if type(value) in (int, bool, str) and "idx" not in key
        )
        key = (type(owner), label, self.linears[name], parts, flags)
        if key not in self._layouts:
            self._layouts[key] = fused_rows(owner, label, self.linears[name], parts)
        return self._layouts[key]

    # Feed-forward

    def _feed_forward(self, name: str) -> str | None:
        """Return the role that a linear module's name gives it in a feed-forward."""
        container, label = parent(name), leaf(name).lower()
        if container in self.channel_mix:
            part = self.channel_mix[container].get(name)
            return {"k": "ff.w1", "v": "ff.w2", "q": "ff.gate"}.get(part or "")
        return feed_forward_role(label, leaf(container), {leaf(child).lower() for child in self.tree.children[container]})

    def _give_feed_forward(self, named: dict[str, str]) -> None:
        """Give the roles of feed-forwards to the linear modules of blocks outside attention."""
        roles = {name: named[name] for name in self.free if name in named}
        unnamed: dict[str, list[str]] = {}
        downs: dict[str, list[str]] = {}
        for name in self.free:
            if roles.get(name) == "ff.w2":
                downs.setdefault(self.block[name], []).append(name)
            elif name not in roles:
                unnamed.setdefault(self.block[name], []).append(name)
        for block, names in unnamed.items():
            if block in downs and not any(roles.get(n) == "ff.w1" for n in self.tree.below(block)):
                shapes = {self.linears[down] for down in downs[block]}
                roles.update({n: "ff.w1" for n in names if self.linears[n][::-1] in shapes and self._narrow(n)})
            elif not any(roles.get(n) for n in self.tree.below(block)) and len(names) == 2:
                first, second = names
                if self.linears[first] == self.linears[second][::-1] and self._narrow(first):
                    roles.update({first: "ff.w1", second: "ff.w2"})
        for name, role in roles.items():
            if role == "ff.w1" and self._is_gated(name, downs.get(self.block[name], [])):
                rows = self._rows(name, ("gate", "w1"))
                self._give(name, "ff.gate", rows["gate"] if rows else None)
                self._give(name, role, rows["w1"] if rows else None)
            else:
                self._give(name, role)
        for name in self.experts:
            if sum(p.dim() == 3 for p in self.tree.modules[name].parameters(recurse=False)) > 1:  # JetMoE: one each, in and out
                self._give(name, "ff.experts")
        for name in self.routers:
            inner = [n for n in self.tree.below(name) if n in self.tree.linears]
            self._give(inner[0] if len(inner) == 1 else name, "ff.router")
        self._give_spans(roles)

    def _narrow(self, name: str) -> bool:
        return self.linears[name][0] < self.linears[name][1]

    def _is_gated(self, name: str, downs: list[str]) -> bool:
        """Say whether a projection makes gate and up at once: what follows it reads half of what it makes."""
        near = [down for down in downs if parent(down) == parent(name)]
        widths = {self.linears[down][0] for down in near}
        return bool(widths) and self.linears[name][1] in {2 * width for width in widths} - widths

    def _give_spans(self, roles: dict[str, str]) -> None:
        """Give ``ff`` to the modules that span one feed-forward."""
        ups = self.tree.count([name for name, role in roles.items() if role != "ff.w2"])
        for name in [*(n for n, role in roles.items() if role == "ff.w2"), *self.experts]:
            block = self.block.get(name)
            if block is None:
                continue
            span = None
            outer = parent(name) if name != block else block
            while not self.holds_mixing[outer]:
                if (outer == block and span) or len(outer) < len(block):
                    break
                if (ups[outer] or name in self.experts) and not self.tree.is_list(outer):
                    span = outer
                outer = parent(outer)
            if span:
                self._give(span, "ff")

    # Mixers

    def _mixers(self, named: set[str]) -> dict[str, tuple[list[str], list[str]]]:
        """Return the modules with projections in and out that are neither attention nor feed-forward."""
        found = {}
        members: dict[str, list[str]] = {}
        for name in self.linears:
            if name not in named and self.attention.keys().isdisjoint(above(name)):
                members.setdefault(parent(name), []).append(name)
        for container, names in members.items():
            outs = [n for n in names if "out" in words(leaf(n))]
            if len(outs) != 1 or not any(part.isdigit() for part in container.split(".")):
                continue
            ins = [n for n in names if n not in outs and self.linears[n][0] == self.linears[outs[0]][1]]
            stated = [n for n in ins if "in" in words(leaf(n))]
            if ins:
                found[container] = (stated or ins, outs)
        return found

    def _give_mixers(self, mixers: dict[str, tuple[list[str], list[str]]]) -> None:
        for container, (ins, outs) in mixers.items():
            if container not in self.block:
                continue
            for name in (*ins, *outs):
                self._give(name, "mixer.in" if name in ins else "mixer.out")
            self._give(self._region(container), "mixer")

    # The rest

    def _give_rest(self) -> None:
        ends = self._output_embeddings()
        order = {name: number for number, name in enumerate(self.tree.modules)}
        last = max((order[name] for name in self.block), default=len(order))
        heads = []
        for name, module in self.tree.modules.items():
            own = [p for p in module._parameters.values() if p is not None]
            if name in ends:
                self._give(name, "lm_head")
            elif "Embedding" in self.tree.kind(name):
                if name not in self.block and any(p.dim() == 2 for p in own):
                    self._give(name, "embedding")
            elif name in self.norms and own:
                self._give(name, "layer_norm")
            elif name in self.tree.linears and name not in self.roles and order[name] > last:
                around = ".".join([name, *(self.tree.kind(a) for a in above(name))]).lower()
                if "pool" not in around:
                    heads.append(name)
        prefixes = {a: getattr(module, "base_model_prefix", "") for a, module in self.tree.modules.items()}
        bases = {f"{name}.{prefix}".lstrip(".") for name, prefix in prefixes.items() if prefix}
        outside = [name for name in heads if bases.isdisjoint(above(name))]
        for name in outside or ([] if ends else heads):
            self._give(name, "head")

    def _output_embeddings(self) -> set[str]:
        found: set[int | None] = set()
        for module in self.tree.modules.values():
            get = getattr(module, "get_output_embeddings", None)
            with contextlib.suppress(AttributeError, NotImplementedError):
                found.add(id(get()) if callable(get) else None)
        return {
            name
            for name, module in self.tree.modules.items()
            if name in self.tree.linears and (id(module) in found or leaf(name) == "lm_head")
        }
