"""From chosen modules to the shortest patterns that mean exactly these: common names, ends of names, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from deltaexp import addressing
from deltaexp.errors import AddressingError, listing
from deltaexp.lab.picker.outline import Unit
from deltaexp.targets import BLOCK

Meaning = Callable[[str], "frozenset[Unit]"]
"""What the engine takes a pattern to mean, with all other keys as they are; nothing where it matches nothing."""

MOST = 16
"""A list of more names than this is no help to anybody."""
EVERYTHING = f"{addressing.REGEX}.+"
"""The pattern of all modules."""
SPECIAL = (addressing.ALL_LINEAR, BLOCK)
"""Patterns that are no module's name."""
NUMBERS = re.compile(r"[\d\\()|\[\]+d-]+")
"""An expression of numbers."""


@dataclass
class Proposal:
    """Patterns that together mean what is chosen."""

    patterns: list[str]
    kind: str
    """What they are, such as ``common names``, ``names`` or ``regular expression``."""


class Proposer:
    """Finds patterns for chosen modules; what each of them means is asked of the engine.

    Args:
        names: The names of the backbone's modules, in its order.
        common: For the name of a module, its names in the common structure.
    """

    def __init__(self, names: Iterable[str], common: Mapping[str, Sequence[str]]) -> None:
        self.order = {name: number for number, name in enumerate(names)}
        self.common = common
        self.roles = {*SPECIAL, *(role for roles in common.values() for role in roles)}
        self.ends: dict[str, set[str]] = {}
        """By end of a name the modules that have it."""
        for name in self.order:
            for end in _ends(name):
                self.ends.setdefault(end, set()).add(name)
        self.numbers: dict[str, set[str]] = {}
        """By name of a list the numbers of what is in it."""
        for name in self.order:
            above, _, last = name.rpartition(".")
            if last.isdigit():
                self.numbers.setdefault(_form(above), set()).add(last)

    def find(self, wanted: frozenset[Unit], meaning: Meaning, common_structure: bool | None = None) -> list[Proposal]:
        """Return ways to name what is chosen, the shortest first.

        Args:
            wanted: What is chosen.
            meaning: What a pattern means.
            common_structure: How patterns are read: True as common names only, False as names of the backbone only.

        Raises:
            AddressingError: If no pattern means it.
        """
        allowed = {name for name, _ in meaning(EVERYTHING)}
        outside = sorted({name for name, _ in wanted} - allowed, key=self.order.__getitem__)
        if outside:
            raise AddressingError(
                f"{listing(outside, 3)} cannot be chosen: exclude_modules or layers leave it out. Change one of the two."
            )
        whole = {name for name, part in wanted if part is None}
        by_role: dict[str, frozenset[Unit]] = {}
        by_name: dict[str, frozenset[Unit]] = {}
        if common_structure is not False:
            roles = {role for name, part in wanted for role in ([part] if part else self.common.get(name, ()))}
            by_role = {role: meaning(role) for role in roles}
        if common_structure is not True:
            # An end that begins with the number of a block reads badly, as do such expressions.
            ends = {end: self.ends[end] & allowed for name in whole for end in _ends(name) if not end[0].isdigit()}
            by_name = {end: frozenset((name, None) for name in names) for end, names in ends.items()}
        found = [Proposal([special], "common names") for special in SPECIAL]
        both = {**by_name, **by_role}
        for candidates, kind in ((by_role, "common names"), (both, "names of both kinds"), (by_name, "names")):
            patterns, left = self._cover(wanted, candidates, by_role, meaning)
            if not left:
                found.append(Proposal(patterns, kind))
            elif patterns and by_name and all(part is None for _, part in left):
                rest = self._searches({name for name, _ in left}, whole, allowed, MOST)
                found.append(Proposal([*patterns, *rest], f"{kind} and regular expression"))
        by_search = by_name and len(whole) == len(wanted)
        if by_search:
            found.append(Proposal(self._searches(whole, whole, allowed, MOST), "regular expression"))
        exact = self._exact(found, wanted, meaning)
        if by_search and not exact:
            exact = self._exact([Proposal(self._searches(whole, whole, allowed), "regular expression")], wanted, meaning)
        if not exact:
            parts = sorted({part for _, part in wanted if part})
            raise AddressingError(
                f"No patterns mean exactly these modules."
                f" A slice of a fused projection ({listing(parts)}) is chosen in all blocks; layers=... leaves blocks out."
                if parts
                else "No patterns mean exactly these modules with exclude_modules, layers and common_structure as they are."
            )
        return sorted(exact, key=lambda proposal: self._cost(proposal.patterns))

    @staticmethod
    def _exact(proposals: Iterable[Proposal], wanted: frozenset[Unit], meaning: Meaning) -> list[Proposal]:
        """Return the proposals that mean exactly what is wanted, each list of patterns once."""
        result: dict[tuple[str, ...], Proposal] = {}
        for proposal in proposals:
            if frozenset(unit for pattern in proposal.patterns for unit in meaning(pattern)) == wanted:
                result.setdefault(tuple(proposal.patterns), proposal)
        return list(result.values())

    def _cost(self, patterns: Sequence[str]) -> int:
        """Return how long a list of patterns is, with something on top for what says less or reads worse than common names."""

        def more(pattern: str) -> int:
            if pattern.startswith(addressing.REGEX):
                return 20
            return 0 if pattern in self.roles else 6

        return sum(len(pattern) + more(pattern) for pattern in patterns)

    def _cover(
        self, wanted: frozenset[Unit], candidates: Mapping[str, frozenset[Unit]], better: Container[str], meaning: Meaning
    ) -> tuple[list[str], set[Unit]]:
        """Return few of the candidates that cover what is wanted, and what of it they leave.

        The one is taken that covers most of the rest; of two that cover as much one in ``better``, else the shorter.
        """
        left, chosen = set(wanted), dict[str, "frozenset[Unit]"]()
        open_ = {pattern: units for pattern, units in candidates.items() if units and units <= wanted}
        while left and len(chosen) < MOST:
            best = max(open_, key=lambda p: (len(open_[p] & left), p in better, -len(p), p), default=None)
            if best is None or not open_[best] & left:
                break
            real = meaning(best)
            del open_[best]
            if real and real <= wanted:
                chosen[best] = real
                left -= real
        for pattern in list(chosen):  # what the later ones have made superfluous
            others = frozenset[Unit]().union(*(units for other, units in chosen.items() if other != pattern))
            if others >= chosen[pattern]:
                del chosen[pattern]
        first = {pattern: min(self.order[name] for name, _ in units) for pattern, units in chosen.items()}
        return sorted(chosen, key=lambda pattern: (first[pattern], pattern)), left

    def _expressions(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Yield regular expressions, each as its components, that together match exactly these names."""
        shapes: dict[str, set[tuple[str, ...]]] = {}
        for name in sorted(names, key=self.order.__getitem__):
            shapes.setdefault(_form(name), set()).add(tuple(part for part in name.split(".") if part.isdigit()))
        tails: dict[tuple[str, tuple[frozenset[str], ...]], list[str]] = {}
        for form, numbered in shapes.items():
            head, star, tail = form.rpartition("*")
            for product in _products(numbered):
                tails.setdefault((head + star, product), []).append(tail.lstrip(".") if star else form)
        for (head, product), ends in tails.items():
            numbers = iter(product)
            parts: list[str] = []
            plain: list[str] = []
            for part in head.split(".") if head else ():
                parts.append(self._numbers(".".join(plain), next(numbers)) if part == "*" else re.escape(part))
                plain.append(part)
            if "" in ends:  # a block itself
                yield parts
            if any(ends):
                yield [*parts, _alternatives([end for end in ends if end])]

    def _numbers(self, form: str, numbers: frozenset[str]) -> str:
        """Return an expression for some of the numbers in a list."""
        if numbers >= self.numbers.get(form, {""}):
            return r"\d+"
        values = sorted(map(int, numbers))
        by_head: dict[str, list[int]] = {}
        for value in values:
            by_head.setdefault(str(value)[:-1], []).append(value % 10)
        # The longest first: a search takes the first alternative that matches the beginning of a number.
        parts = [head + _digits(by_head[head]) for head in sorted(by_head, key=lambda head: (-len(head), head))]
        return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"

    def _searches(self, wanted: set[str], also: set[str], allowed: set[str], most: int | None = None) -> list[str]:
        """Return few short regular expressions that together match these names, or no more than ``most`` of them.

        Args:
            wanted: The names.
            also: Names that they may match, the wanted ones among them.
            allowed: All names that patterns can mean.
            most: How many there may be.
        """

        def matched(pattern: str) -> set[str]:
            return {name for name in allowed if addressing.matches(pattern, name)}

        left, first = set(wanted), dict[str, int]()
        for parts in self._expressions(wanted):
            anchored = f"{addressing.REGEX}^" + r"\.".join(parts)
            exact = matched(anchored)
            if not exact & left:
                continue
            if len(first) == most:
                break
            starts = [start for start in range(len(parts)) if not NUMBERS.fullmatch(parts[start])]
            options = [addressing.REGEX + r"\.".join(parts[start:]) for start in reversed(starts)]
            best = next((option for option in options if exact <= matched(option) <= also), anchored)
            first[best] = min(map(self.order.__getitem__, exact))
            left -= matched(best)
        return sorted(first, key=first.__getitem__)


def _ends(name: str) -> Iterator[str]:
    """Yield the ends of a name that begin with a component."""
    parts = name.split(".") if name else []
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _form(name: str) -> str:
    """Return a name with stars for the numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _products(numbers: Iterable[tuple[str, ...]]) -> list[tuple[frozenset[str], ...]]:
    """Return products of sets that together have exactly these tuples."""
    rests: dict[str, set[tuple[str, ...]]] = {}
    for first, *rest in filter(None, numbers):
        rests.setdefault(first, set()).add(tuple(rest))
    if not rests:
        return [()]
    alike: dict[frozenset[tuple[str, ...]], set[str]] = {}
    for first, found in rests.items():
        alike.setdefault(frozenset(found), set()).add(first)
    return [(frozenset(firsts), *product) for found, firsts in alike.items() for product in _products(found)]


def _digits(values: Sequence[int]) -> str:
    """Return an expression for some of the ten digits."""
    if len(values) == 1:
        return str(values[0])
    if len(values) == 10:
        return r"\d"
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"[{values[0]}-{values[-1]}]"
    return f"[{''.join(map(str, values))}]"


def _alternatives(tails: Sequence[str]) -> str:
    """Return an expression for some ends of names; those in one module share its name."""
    inside: dict[str, list[str]] = {}
    for tail in sorted(tails, key=lambda tail: -len(tail)):
        above, _, last = tail.rpartition(".")
        inside.setdefault(above, []).append(re.escape(last))
    parts = []
    for above, leaves in inside.items():
        leaf = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        parts.append(rf"{re.escape(above)}\.{leaf}" if above else leaf)
    return parts[0] if len(parts) < 2 else f"({'|'.join(parts)})"
