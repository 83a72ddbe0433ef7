"""The model card: what the plain one says, and which cards are refused before a push."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from deltaexp.card import LARGEST, LICENSES, base_model, check_card, front, plain_card, tags
from deltaexp.errors import CardError
from deltaexp.registry import DeltaConfig, SavedWith


def config(name: str | None = "google-t5/t5-base") -> DeltaConfig:
    made = DeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4, "modified_modules": ["attn.q", "a|b`c"]})
    made.saved_with = SavedWith(backbone_class="T5Model", backbone_checkpoint_name=name)
    return made


def card(**values: object) -> str:
    return front(tags=tags("lora"), **values) + "\n\n# A delta\n"


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_plain_card() -> None:
    text = plain_card(config())
    check_card(text)
    data = metadata(text)
    assert data["base_model"] == "google-t5/t5-base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "deltaexp"
    assert data["tags"] == ["deltaexp", "delta-tuning", "lora", "delta_type:lora"]
    assert 'T5Model.from_pretrained("google-t5/t5-base")' in text
    assert "AutoDeltaModel.from_finetuned" in text
    row = next(line for line in text.splitlines() if "modified_modules" in line)
    assert row == r"| `modified_modules` | `['attn.q', 'a\|b'c']` |"


@pytest.mark.parametrize("name", ["my_backbone", "embedded:tiny_t5", "package:a/b", None])
def test_a_backbone_of_no_repository_is_no_base_model(name: str | None) -> None:
    data = metadata(plain_card(config(name)))
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_names_without_an_organisation() -> None:
    assert base_model("t5-base") is None
    assert base_model("t5-base", from_hub=True) == "t5-base"
    assert base_model("/home/ada/t5", from_hub=True) is None
    assert base_model("../t5", from_hub=True) is None


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"base_model": "/home/ada/t5"}, "base_model in the model card is '/home/ada/t5'"),
        ({"base_model": ["google-t5/t5-base", "../x"]}, r"'\.\./x', which is no name of a repository"),
        ({"datasets": ["my data"]}, "datasets in the model card is 'my data'"),
        ({"license": "apache2"}, "'apache2', which the Hub does not know. Did you mean 'apache-2.0'"),
        ({"license": ["mit", "none"]}, "'none', which the Hub does not know"),
        ({"language": "English"}, "'English'; it must be a code of ISO 639"),
        ({"note": "hf_" + "a" * 34}, "an access token"),
    ],
)
def test_what_the_hub_would_refuse(values: dict[str, object], what: str) -> None:
    with pytest.raises(CardError, match=what):
        check_card(card(**values))


@pytest.mark.parametrize(
    "text",
    [
        "# No metadata\n",
        "",
        "---\nlibrary_name: [deltaexp\n---\n",
        "---\n- deltaexp\n---\n",
        "---\nlibrary_name: deltaexp\nlibrary_name: peft\n---\n",
        "---\nlibrary_name: deltaexp\ntags: !!python/object/apply:os.system [ls]\n---\n",
        "---\nlibrary_name: deltaexp\nlicense: mit\n",
        "---\nlibrary_name: peft\n---\n",
        "---\nlibrary_name: deltaexp\ntags: [1]\n---\n",
        "---\nlibrary_name: deltaexp\nmodel-index: 7\n---\n",
    ],
)
def test_metadata_that_cannot_be_understood(text: str) -> None:
    with pytest.raises(CardError):
        check_card(text)


def test_a_card_that_is_too_long() -> None:
    with pytest.raises(CardError, match="bytes, and it may have"):
        check_card(card() + "x" * LARGEST)


@pytest.mark.parametrize("name", ["apache-2.0", "mit", "cc-by-nc-sa-4.0", "llama3.2", "gemma", "openrail++", "other"])
def test_known_licences(name: str) -> None:
    assert name in LICENSES
    check_card(card(license=name))


@pytest.mark.parametrize("language", ["en", "no", "zh-Hant", "code", "multilingual", ["en", "de"]])
def test_languages(language: object) -> None:
    text = card(language=language)
    check_card(text)
    assert metadata(text)["language"] == language  # "no" is a language, and not false


@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=200))
def test_any_text_is_a_card_or_a_card_error(text: str) -> None:
    for content in (text, f"---\n{text}\n---\n", f"---\nlibrary_name: deltaexp\nnote: {text}\n---\n"):
        try:
            check_card(content)
        except CardError:
            continue
        assert ModelCard(content).data.library_name == "deltaexp"
