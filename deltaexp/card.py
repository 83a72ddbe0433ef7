"""The model card of a delta: what it is, how to load it, what it scored."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deltaexp.registry import DeltaConfig

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What the name of a repository on the Hub looks like."""


def plain_card(
    config: DeltaConfig,
    *,
    repo: str = "PATH_OR_REPO",
    loader: str | None = None,
    tags: Sequence[str] = (),
    sections: Sequence[str] = (),
) -> str:
    """Return the text of a card in the Hub's format.

    Args:
        config: The delta's config, with the record of its backbone.
        repo: What the loading code names as the delta.
        loader: Python lines that make ``backbone_model``.
        tags: More tags.
        sections: More Markdown sections.
    """
    from huggingface_hub import ModelCardData

    record = config.saved_with
    name = record.backbone_checkpoint_name
    data = ModelCardData(
        library_name="deltaexp",
        tags=["deltaexp", "delta-tuning", config.delta_type, *tags],
        # The Hub refuses a base_model that is no repository; a local backbone is named in the text only.
        base_model=name if name and REPO_ID.fullmatch(name) else None,
    )
    keys = {k: v for k, v in config.to_dict().items() if v is not None}
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in sorted(keys.items()))
    code = loader or (
        f"from transformers import {record.backbone_class}\n\n"
        f'backbone_model = {record.backbone_class}.from_pretrained("{name or "PATH_OR_NAME"}")'
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A {config.delta_type} delta for {name or record.backbone_class}",
        "Trained with deltaexp. It holds only what was trained, and a digest of the backbone that it belongs to: loading it "
        "onto another is refused.",
        f"```python\nfrom deltaexp import AutoDeltaModel\n{code}\n"
        f'delta_model = AutoDeltaModel.from_finetuned("{repo}", backbone_model=backbone_model)\n```',
        *sections,
        f"## Config\n\n| key | value |\n| --- | --- |\n{rows}",
    ]
    return "\n\n".join(parts) + "\n"
