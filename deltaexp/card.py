"""The model card of a delta: what it is and how to load it, and whether the Hub takes it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from deltaexp.errors import CardError, did_you_mean
from deltaexp.hubclient import is_repo_id
from deltaexp.redaction import is_secret
from deltaexp.registry import DeltaConfig

LIBRARY = "deltaexp"
"""The name of this library on the Hub."""
LARGEST = 1 << 20
"""Bytes that a card may have."""
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
LICENSES = [
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl",
    "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr",
    "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense",
    "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
]  # fmt: skip
"""The licences that the Hub knows (https://huggingface.co/docs/hub/repositories-licenses)."""


def tags(delta_type: str, *more: str) -> list[str]:
    """Return the tags of a delta's card, by which `deltaexp.searching` finds it."""
    return list(dict.fromkeys([LIBRARY, "delta-tuning", delta_type, f"delta_type:{delta_type}", *more]))


def base_model(name: str | None, from_hub: bool = False) -> str | None:
    """Return a backbone's name where it is that of a repository, and None where it is a folder's or a package's.

    Args:
        name: The name that the delta records.
        from_hub: Whether the backbone is known to come from the Hub, where old names have no organisation.
    """
    return name if name and _is_repo(name, from_hub) else None


def front(**values: Any) -> str:
    """Return the card's metadata as YAML between its marks; what is None is left out."""
    from huggingface_hub import ModelCardData

    if values.get("base_model") is not None:
        values.setdefault("base_model_relation", "adapter")
    return f"---\n{ModelCardData(library_name=LIBRARY, **values).to_yaml()}\n---"


def loading(loader: str, repo: str, revision: str | None = None) -> str:
    """Return a block of code that loads a delta onto the backbone that ``loader`` makes."""
    at = f", revision={revision!r}" if revision else ""
    return (
        f"```python\nfrom deltaexp import AutoDeltaModel\n{loader}\n"
        f'delta_model = AutoDeltaModel.from_finetuned("{repo}", backbone_model=backbone_model{at})\n```'
    )


def config_table(config: DeltaConfig) -> str:
    """Return the keys of a delta's config as a table of Markdown."""
    keys = {key: value for key, value in config.to_dict().items() if value is not None}
    rows = "\n".join(f"| `{key}` | `{cell(value)}` |" for key, value in sorted(keys.items()))
    return f"## Config\n\n| key | value |\n| --- | --- |\n{rows}"


def cell(value: object) -> str:
    """Return a value as it may stand in a table of Markdown."""
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", " ")


def plain_card(
    config: DeltaConfig,
    *,
    repo: str = "PATH_OR_REPO",
    loader: str | None = None,
    sections: Sequence[str] = (),
) -> str:
    """Return the text of the card of a delta that no run of the lab has made.

    Args:
        config: The delta's config, with the record of its backbone.
        repo: What the loading code names as the delta.
        loader: Python lines that make ``backbone_model``.
        sections: More Markdown sections.
    """
    record = config.saved_with
    name = record.backbone_checkpoint_name
    code = loader or (
        f"from transformers import {record.backbone_class}\n\n"
        f'backbone_model = {record.backbone_class}.from_pretrained("{name or "PATH_OR_NAME"}")'
    )
    parts = [
        # The Hub refuses a base_model that is no repository; a local backbone is named in the text only.
        front(tags=tags(config.delta_type), base_model=base_model(name)),
        f"# A {config.delta_type} delta for {name or record.backbone_class}",
        "Trained with deltaexp. It holds only what was trained, and a digest of the backbone that it belongs to: loading it "
        "onto another is refused.",
        loading(code, repo),
        *sections,
        config_table(config),
    ]
    return "\n\n".join(parts) + "\n"


def check_card(text: str) -> None:
    """Check a card by the Hub's rules, as far as they can be checked without asking it.

    Raises:
        CardError: If the Hub would refuse it, or would show it without its metadata.
    """
    if len(text.encode()) > LARGEST:
        raise CardError(
            f"The model card has {len(text.encode()):,} bytes, and it may have {LARGEST:,}. Make README.md shorter."
        )
    if is_secret(text):
        raise CardError("The model card holds what looks like an access token or a password. Take it out of README.md.")
    data = metadata(text)
    for key in ("base_model", "datasets"):
        for name in _several(data.get(key)):
            if not isinstance(name, str) or not _is_repo(name, True):
                raise CardError(
                    f"{key} in the model card is {name!r}, which is no name of a repository. Leave it out or correct it."
                )
    for name in _several(data.get("license")):
        if name not in LICENSES:
            hint = did_you_mean(str(name), LICENSES)
            raise CardError(
                f"The licence in the model card is {name!r}, which the Hub does not know.{hint} Its list: "
                "https://huggingface.co/docs/hub/repositories-licenses; for any other licence take hub.license=other."
            )
    for name in _several(data.get("language")):
        if not isinstance(name, str) or not LANGUAGE.fullmatch(name):
            raise CardError(f"The language in the model card is {name!r}; it must be a code of ISO 639, such as 'en'.")
    for name in _several(data.get("tags")):
        if not isinstance(name, str) or not name:
            raise CardError(f"A tag in the model card is {name!r}; tags must be texts.")
    if data.get("library_name") != LIBRARY:
        raise CardError(f"library_name in the model card is {data.get('library_name')!r}; it must be {LIBRARY!r}.")


def metadata(text: str) -> dict[str, Any]:
    """Return a card's metadata, read as YAML that can make nothing but plain values."""
    from huggingface_hub import ModelCard

    if not re.match(r"\s*---[ \t]*\r?\n.*?\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL):
        raise CardError("The model card has no metadata: README.md must begin with a block of YAML between two lines of '---'.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = ModelCard(text).data.to_dict()
    except Exception as error:  # of the YAML parser or of the client's checks, which have no class in common
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CardError(
            f"The metadata of the model card cannot be understood: {first} Correct the head of README.md."
        ) from error
    return data


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _is_repo(name: str, bare: bool) -> bool:
    return is_repo_id(name) or (bare and is_repo_id(f"any/{name}"))
