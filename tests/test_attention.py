"""Layers in front of a model's own attention: names, masks, and what the model sees of it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, attach, logits
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from deltaexp import attention
from deltaexp.attention import ConfigView, attention_cores
from deltaexp.errors import DeltaExpError


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register an attention function that takes what flash attention takes, and masks as that does."""

    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple:
        assert module.config._attn_implementation == "flash_by_hand"
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        queries, keys = query.shape[2], key.shape[2]
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)  # counted from the end
        if mask is not None:
            assert mask.shape == (len(query), keys)
            visible = visible & mask.bool()[:, None, None]
        scores = (query @ key.mT * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_by_hand", forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_by_hand", flash_attention_mask)
    monkeypatch.setitem(AttentionInterface._global_mapping, "deltaexp_flash_by_hand", attention.attend)
    return "flash_by_hand"


def with_prefix(name: str = "llama", **keys: Any) -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    backbone, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    delta_model = attach(backbone, "prefix", reparameterize=False, prefix_token_num=3, **keys)
    return backbone, inputs, delta_model


def test_cores_are_found() -> None:
    found = {name: attention_cores(family.build()) for name, family in FAMILIES.items()}
    assert found["gpt2"] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert found["bert"] == [f"bert.encoder.layer.{n}.attention.self" for n in (0, 1)]
    assert attention_cores(FAMILIES["llama"].build().model.layers[0].self_attn) == [""]
    assert attention_cores(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_keeps_its_config(name: str, tmp_path: Path) -> None:
    backbone = FAMILIES[name].build()
    configs = {key: module.config for key, module in backbone.named_modules() if hasattr(module, "config")}
    backbone.save_pretrained(tmp_path / "before")
    delta_model = attach(backbone, "prefix")
    backbone.save_pretrained(tmp_path / "attached")
    assert "deltaexp" not in str(backbone.config.to_dict())
    for file in ("before", "attached"):
        saved = json.loads((tmp_path / file / "config.json").read_text())
        assert saved == json.loads((tmp_path / "before" / "config.json").read_text())
    viewed = [key for key in configs if backbone.get_submodule(key).config is not configs[key]]
    assert viewed == [key for key in attention_cores(backbone) if "EncDec" not in key]  # no cross-attention
    delta_model.detach()
    assert all(backbone.get_submodule(key).config is config for key, config in configs.items())
    assert not any(attention.CARRIED in module.__dict__ for module in backbone.modules())


def test_a_view_follows_its_config() -> None:
    config = FAMILIES["llama"].build().config
    view: Any = ConfigView(config, attention.NAME, attention.attend)
    assert view._attn_implementation == "deltaexp_sdpa"
    config._attn_implementation = "eager"
    assert view._attn_implementation == "deltaexp_eager"
    assert view.hidden_size == config.hidden_size
    view.attention_dropout = 0.5
    assert config.attention_dropout == 0.5
    for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert isinstance(twin, ConfigView)
        assert twin.original is not config
        assert twin.hidden_size == config.hidden_size
    with pytest.raises(AttributeError):
        _ = view.no_such_key


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_flash_attention_masks(flash: str, padded: bool) -> None:
    backbone, inputs, _ = with_prefix()
    if padded:
        inputs["attention_mask"][1, :3] = 0
    expected = logits(backbone, inputs)
    backbone.config._attn_implementation = flash
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(backbone, inputs)[visible], expected[visible])


def test_what_flash_attention_would_get_wrong_is_refused(flash: str) -> None:
    backbone = with_prefix()[0]
    backbone.config._attn_implementation = flash
    core = backbone.model.layers[0].self_attn
    x = torch.randn(1, 4, 2, 4)
    for keys, reason in (
        ({"sliding_window": 4}, "window"),
        ({"cu_seq_lens_k": torch.tensor([0, 2])}, "packed"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "packed"),
    ):
        with pytest.raises(DeltaExpError, match=reason):
            attention.attend(core, x, x[:, :2], x[:, :2], None, **keys)
    backbone.config._attn_implementation = "paged|sdpa"
    with pytest.raises(DeltaExpError, match="continuous batching"):
        attention.attend(core, x, x[:, :2], x[:, :2], None)


def test_a_block_mask_is_extended() -> None:
    core = FAMILIES["llama"].build().model.layers[0].self_attn
    padding = torch.tensor([[True] * 5, [True, True, False, False, False]])
    mask = create_block_mask(lambda b, h, q, k: (k <= q) & padding[b, k], 2, None, 4, 5, device="cpu")
    longer = attention._extended(core, "flex_attention", mask, 4, 5, 3, None)
    assert longer.seq_lengths == (4, 8)
    batch, query, key = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(8), indexing="ij")
    expected = torch.cat([torch.ones(2, 4, 3, dtype=torch.bool), torch.ones(4, 5).tril().bool() & padding[:, None]], -1)
    assert torch.equal(longer.mask_mod(batch, torch.zeros(()), query, key), expected)


def test_masks_are_extended() -> None:
    core = FAMILIES["llama"].build().model.layers[0].self_attn

    def extended(mask: Any, queries: int = 2, keys: int = 2, name: str = "sdpa", causal: bool | None = None) -> Any:
        return attention._extended(core, name, mask, queries, keys, 1, causal)

    assert extended(None).tolist() == [[[[True, True, False], [True, True, True]]]]
    # The cache of a fixed size, whose places after the text are empty.
    assert extended(None, keys=3).tolist() == [[[[True, True, False, False], [True, True, True, False]]]]
    assert extended(None, queries=1) is None
    assert extended(None, causal=False) is None
    assert extended(None, name="eager") is None
    low = torch.finfo(torch.float32).min
    assert extended(torch.tensor([[[[0.0, low], [0.0, 0.0]]]])).tolist() == [[[[0, 0, low], [0, 0, 0]]]]
    assert extended(torch.tensor([[1, 0]]), name="flash_attention_2").tolist() == [[1, 1, 0]]


def test_a_width_that_does_not_fit_is_an_error() -> None:
    backbone, inputs, delta_model = with_prefix()
    layer = delta_model.attachments[0].layer
    layer.past_key = nn.Parameter(torch.zeros(3, 10))
    with pytest.raises(DeltaExpError, match="width 10"):
        logits(backbone, inputs)


ALL_ATTENTION_FUNCTIONS: dict[str, Any] = {}


class NoDefault(nn.Module):
    """An attention whose code gives no function for a name that is not in the table."""

    def forward(self) -> Any:
        """Look for it as modelling files do."""
        return ALL_ATTENTION_FUNCTIONS["eager"]


def test_an_unknown_function_is_an_error() -> None:
    with pytest.raises(DeltaExpError, match="NoDefault has no attention function 'eager'"):
        attention.own_function(NoDefault(), "eager")
