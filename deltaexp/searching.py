"""Finding deltas on the Hugging Face Hub by the tags of their cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from deltaexp.card import LIBRARY
from deltaexp.errors import ConfigError
from deltaexp.hubclient import explained, persistently

EXPANDED: list[Any] = ["author", "cardData", "lastModified", "model-index", "private", "tags"]
"""What the Hub is asked to tell of each repository."""


@dataclass(frozen=True)
class Found:
    """A delta on the Hub, by what its card says."""

    repo: str
    delta_type: str | None
    base: str | None
    task: str | None
    metric: str | None
    """The name of the first metric of the card."""
    value: float | None
    updated: str | None
    """Day of the last commit."""
    private: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as a flat dict."""
        return asdict(self)


def search(
    *,
    base: str | None = None,
    task: str | None = None,
    delta_type: str | None = None,
    author: str | None = None,
    limit: int = 20,
    token: str | None = None,
) -> list[Found]:
    """Return the deltas on the Hub that fit, the newest first.

    Args:
        base: The backbone: a repository, or the last part of its name, in which ``-`` and ``_`` are the same.
        task: The task's name.
        delta_type: The type of delta.
        author: A user or an organisation.
        limit: How many at most.
        token: Access token; None takes the one of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ConfigError: If the limit is no positive number.
        HubError: If the Hub cannot be asked.
    """
    from huggingface_hub import HfApi

    if limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1.")
    tags = [LIBRARY]
    tags += [f"delta_type:{delta_type}"] if delta_type else []
    tags += [f"task:{task}"] if task else []
    tags += [f"base_model:{base}"] if base and "/" in base else []

    def action() -> list[Found]:
        entries: Iterator[Any] = iter(
            HfApi(token=token).list_models(filter=tags, author=author, sort="last_modified", expand=EXPANDED)
        )
        found = (_found(entry) for entry in entries)
        return list(islice((one for one in found if not base or _fits(one.base, base)), limit))

    with explained("The Hub could not be searched", token=token):
        return persistently("searching", action, attempts=1)  # the client itself tries again


def _fits(found: str | None, wanted: str) -> bool:
    if "/" in wanted:
        return found is not None and found.lower() == wanted.lower()
    return found is not None and _folded(found.split("/")[-1].split(":")[-1]) == _folded(wanted)


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")


def _found(entry: Any) -> Found:
    """Read what the Hub tells of a repository, which anybody may have written: what is not as expected is left out."""
    tags = [tag for tag in entry.tags or [] if isinstance(tag, str)]

    def tagged(prefix: str) -> str | None:
        return next((tag[len(prefix) :] for tag in tags if tag.startswith(prefix)), None)

    plain = (tag[len("base_model:") :] for tag in tags if tag.startswith("base_model:"))
    base = next((name for name in plain if ":" not in name), None) or tagged("backbone:")
    name, value = _metric(entry)
    updated = entry.last_modified
    return Found(
        repo=entry.id,
        delta_type=tagged("delta_type:"),
        base=base,
        task=tagged("task:"),
        metric=name,
        value=value,
        updated=f"{updated:%Y-%m-%d}" if updated else None,
        private=bool(entry.private),
    )


def _metric(entry: Any) -> tuple[str | None, float | None]:
    """Return the first metric of a card's model-index."""
    index = getattr(entry, "model_index", None)
    try:
        if index:
            metric = index[0]["results"][0]["metrics"][0]
            return str(metric.get("name") or metric["type"]), float(metric["value"])
        results = entry.card_data.eval_results
        return str(results[0].metric_name or results[0].metric_type), float(results[0].metric_value)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None, None
