"""Name-based addressing: which modules a list of patterns means.

A pattern is one of

- a suffix: ``SelfAttention.q`` means every module whose dotted name is, or ends with, exactly these components;
- a regular expression after ``[r]``: ``[r](\\d)+\\.EncDecAttention\\.q`` means every module with a `re.search` match
  that starts at the beginning of a component and ends at the end of the name;
- a name of the common structure (see `deltaexp.structure`): ``attn.q``, or in OpenDelta's spelling ``attn@.q@``;
- ``all-linear``: every linear map but the heads and the routers of experts (see `deltaexp.targets`).

The rules are OpenDelta's (https://github.com/thunlp/OpenDelta), but a pattern that matches nothing is an error. Only
names are dealt with here, so that nothing in this module needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

from deltaexp.errors import AddressingError, ConfigError, listing, nearest

REGEX = "[r]"
"""What a regular expression starts with."""
ALL_LINEAR = "all-linear"
"""The pattern that means every linear map."""

PATIENCE = 2.0
"""Seconds that a regular expression may take for one name."""
DIGITS = 5
"""Digits that the number of a block may have."""

CommonNames = Mapping[str, Sequence[str]]
"""For the name of a module, its names in the common structure (a fused projection has several)."""


def matches(pattern: str, name: str) -> bool:
    """Say whether ``pattern``, a suffix or a regular expression, means the module called ``name``.

    Raises:
        AddressingError: If the regular expression is malformed, or would search for ever.
    """
    if not pattern.startswith(REGEX):
        return bool(pattern) and (name == pattern or name.endswith("." + pattern))
    found = search(pattern[len(REGEX) :], name)
    return found is not None and found.end() == len(name) and (found.start() == 0 or name[found.start() - 1] == ".")


def search(expression: str, name: str, whole: bool = False) -> Any:
    """Return the match of a regular expression in a name, or with the ``whole`` name; None where there is none.

    A config may come from anybody, and some expressions search for years: `regex`, unlike `re`, can be told to give up.

    Raises:
        AddressingError: If the expression is malformed, or would search for ever.
    """
    try:
        pattern = _compiled(expression)
        return (pattern.fullmatch if whole else pattern.search)(name, timeout=PATIENCE)
    except (regex.error, RecursionError, OverflowError) as error:
        raise AddressingError(f"The pattern {expression!r} is not a regular expression: {error}.") from error
    except TimeoutError as error:
        raise AddressingError(
            f"The pattern {expression[:60]!r} is still searching the name {name!r} after {PATIENCE:g} s. Write it without one "
            "repetition inside of another."
        ) from error


@lru_cache(maxsize=256)
def _compiled(expression: str) -> Any:
    """Return a compiled regular expression; `regex` keeps them too, and takes longer to find one than to search a name."""
    return regex.compile(expression)


def covers(pattern: str, name: str, common: Sequence[str] = ()) -> bool:
    """Say whether ``pattern`` means the module called ``name`` or one that contains it.

    ``common`` are the names of that module in the common structure.
    """
    if pattern.startswith(REGEX):
        parts = name.split(".")
        return any(matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
    return f".{pattern}." in f".{name}." or pattern.replace("@", "") in common


def resolve(
    patterns: Iterable[str],
    names: Sequence[str],
    *,
    common: CommonNames | None = None,
    common_structure: bool | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, list[str]]:
    """Return, pattern by pattern, the names of the modules that it means, in the order of ``names``.

    Args:
        patterns: What to look for.
        names: The dotted names of the backbone's modules.
        common: The modules' names in the common structure.
        common_structure: True to read patterns as common names only, False as names of the backbone only; None reads
            a pattern as a name of the backbone and, where that matches nothing, as a common name.
        exclude: Patterns of modules that are left out, with everything below them.

    Raises:
        AddressingError: If a pattern matches nothing, or nothing but excluded modules.
    """
    common = common or {}
    excluded = list(exclude)
    result = {}
    for pattern in patterns:
        found = _find(pattern, names, common, common_structure)
        if not found:
            raise AddressingError(_nothing(pattern, names, common))
        kept = [name for name in found if not any(covers(entry, name, common.get(name, ())) for entry in excluded)]
        if not kept:
            raise AddressingError(
                f"The pattern {pattern!r} matches {listing(found, 3)}, and exclude_modules {excluded!r} rules all of "
                "them out, so nothing would be modified. Change one of the two."
            )
        result[pattern] = kept
    return result


def roles(pattern: str, name: str, common: CommonNames) -> list[str]:
    """Return the names in the common structure by which ``pattern`` means the module called ``name``."""
    plain = pattern.replace("@", "")
    return [role for role in common.get(name, ()) if matches(plain, role)]


def layer_numbers(spec: Any, count: int | None = None) -> set[int]:
    """Return the numbers of the blocks that ``layers`` means in a stack of ``count`` blocks.

    Args:
        spec: A number, a list of numbers, or ``"a-b"``, ``"first:n"``, ``"last:n"``.
        count: How many blocks there are; None only checks the spelling.

    Raises:
        ConfigError: If it is none of these.
    """
    parts = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    result: set[int] = set()
    for part in parts:
        found = re.fullmatch(r"(first|last):(\d+)|(\d+)(?:-(\d+))?", str(part))
        if found is None or isinstance(part, bool) or not parts:
            raise ConfigError(
                f"layers is {spec!r}; it must be a list of block numbers such as [20, 21], or '0-5', 'first:4' or 'last:4'."
            )
        end, number, start, stop = found.groups()
        last = count if count is not None else 0
        if end == "first":
            result |= set(range(min(int(number), last)))
        elif end == "last":
            result |= set(range(max(0, last - int(number)), last))
        else:
            if max(len(start), len(stop or "")) > DIGITS:
                raise ConfigError(f"layers is {spec!r}, and no stack has a block of that number.")
            result |= set(range(int(start), int(stop or start) + 1))
    if not parts:
        raise ConfigError("layers is an empty list, so nothing would be modified. Leave it out to modify every block.")
    return result if count is None else {number for number in result if number < count}


def _find(pattern: str, names: Sequence[str], common: CommonNames, common_structure: bool | None) -> list[str]:
    if common_structure is not True and "@" not in pattern:
        found = [name for name in names if matches(pattern, name)]
        if found or common_structure is False:
            return found
    return [name for name in names if roles(pattern, name, common)]


def _nothing(pattern: str, names: Sequence[str], common: CommonNames) -> str:
    """Return the sentence for a pattern that matches no module."""
    roles = sorted({role for found in common.values() for role in found})
    length = pattern.removeprefix(REGEX).count(".") + 1
    # The same suffix recurs in every block, so what is compared are suffixes as long as the pattern.
    suffixes = {".".join(name.split(".")[-length:]): name for name in names if name}
    close = nearest(pattern.removeprefix(REGEX).replace("@", ""), [*suffixes, *roles])
    hint = f" The nearest names are {listing(map(repr, close))}." if close else ""
    if not hint:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name.rsplit(".", 1)[-1].isdigit()})
        hint = f" The modules' last names are: {listing(leaves, 30)}."
    example = f" The common structure here has: {listing(roles, 20)}." if roles else ""
    return f"The pattern {pattern!r} matches no module of this backbone.{hint}{example}"
