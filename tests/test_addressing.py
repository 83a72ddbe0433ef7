"""Which modules a pattern means: OpenDelta's rules, with an error where it means none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, attach

from deltaexp.addressing import covers, matches, resolve
from deltaexp.errors import AddressingError
from deltaexp.structure import backbone_modules, common_names

NAMES = [
    "",
    "encoder",
    "encoder.block.0",
    "encoder.block.0.layer.0.SelfAttention",
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.10.layer.0.SelfAttention.q",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "decoder.block.0.layer.1.EncDecAttention.freq",
    "lm_head",
    "lm_head.dense",
]
COMMON = {
    "encoder.block.0.layer.0.SelfAttention.q": ["attn.q"],
    "encoder.block.10.layer.0.SelfAttention.q": ["attn.q", "attn.k", "attn.v"],
    "decoder.block.0.layer.1.EncDecAttention.q": ["crossattn.q"],
    "lm_head": ["lm_head"],
}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q", "encoder.block.0.layer.0.SelfAttention.q", True),
        ("SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q", True),
        ("0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q", True),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q", True),
        ("x.encoder", "encoder", False),
        ("q", "decoder.EncDecAttention.freq", False),
        ("ention.q", "encoder.SelfAttention.q", False),
        ("SelfAttention", "encoder.SelfAttention.q", False),
        (".q", "encoder.SelfAttention.q", False),
        ("Q", "encoder.q", False),
        ("", "", False),
        ("", "encoder", False),
        ("block.1", "block.11", False),
        ("1", "block.1", True),
        # A dot in a suffix is a dot.
        ("a.q", "encoder.abq", False),
        # Regular expressions.
        (r"[r](\d)+\.SelfAttention", "encoder.layer.10.SelfAttention", True),
        (r"[r](\d)+\.SelfAttention", "encoder.layer.10.SelfAttention.q", False),
        (r"[r](\d)+\.SelfAttention\.[qv]", "encoder.layer.10.SelfAttention.v", True),
        (r"[r]0\.SelfAttention", "encoder.layer.10.SelfAttention", False),
        (r"[r]encoder.*q", "encoder.block.0.q", True),
        (r"[r]encoder.*q", "my_encoder.block.0.q", False),
        (r"[r]q|k", "a.k", True),
        (r"[r]block\.\d", "encoder.block.11", False),
        # Like OpenDelta: the first match decides, also where a later one would end at the end.
        (r"[r]q", "encoder.query.q", False),
        (r"[r]$", "encoder", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


COMPONENT = st.text("qk0A_", min_size=1, max_size=3)
DOTTED = st.lists(COMPONENT, min_size=1, max_size=4).map(".".join)


@settings(max_examples=300)
@given(pattern=DOTTED, name=DOTTED)
def test_a_suffix_is_the_last_components(pattern: str, name: str) -> None:
    wanted, parts = pattern.split("."), name.split(".")
    assert matches(pattern, name) == (parts[-len(wanted) :] == wanted)


@settings(max_examples=200)
@given(name=DOTTED, data=st.data())
def test_every_suffix_of_a_name_means_it(name: str, data: st.DataObject) -> None:
    parts = name.split(".")
    suffix = ".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :])
    assert matches(suffix, name)
    assert covers(suffix, f"{name}.below")
    assert not matches("x" + suffix, name)
    assert matches("[r]" + suffix.replace(".", r"\."), suffix)


@settings(max_examples=200)
@given(pattern=DOTTED, name=DOTTED)
def test_what_a_pattern_covers(pattern: str, name: str) -> None:
    """A module is covered if it, or a module that contains it, is meant."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    assert covers(pattern, name) == any(matches(pattern, container) for container in above)


def test_a_bad_regular_expression() -> None:
    with pytest.raises(AddressingError, match=r"'\(q' is not a regular expression: .*missing \)"):
        resolve(["[r](q"], NAMES)
    with pytest.raises(AddressingError, match="is not a regular expression"):
        resolve(["q"], NAMES, exclude=["[r]*"])


def test_resolve_keeps_patterns_apart_and_names_in_order() -> None:
    found = resolve(["EncDecAttention.q", "q", r"[r]encoder\.block\.\d+\.layer\.0\.SelfAttention\.q"], NAMES)
    assert found == {
        "EncDecAttention.q": [NAMES[6]],
        "q": [NAMES[4], NAMES[5], NAMES[6]],
        r"[r]encoder\.block\.\d+\.layer\.0\.SelfAttention\.q": [NAMES[4], NAMES[5]],
    }


@pytest.mark.parametrize("pattern", ["attn.q", "attn@.q", "attn@.q@"])
@pytest.mark.parametrize("common_structure", [True, None])
def test_common_names(pattern: str, common_structure: bool | None) -> None:
    found = resolve([pattern], NAMES, common=COMMON, common_structure=common_structure)
    assert found == {pattern: [NAMES[4], NAMES[5]]}


def test_which_names_are_meant() -> None:
    # True: common names only, as in OpenDelta. "q" is then the suffix of a common name.
    assert resolve(["q"], NAMES, common=COMMON, common_structure=True) == {"q": [NAMES[4], NAMES[5], NAMES[6]]}
    with pytest.raises(AddressingError):
        resolve(["SelfAttention.q"], NAMES, common=COMMON, common_structure=True)
    # False: names of the backbone only.
    with pytest.raises(AddressingError):
        resolve(["attn.q"], NAMES, common=COMMON, common_structure=False)
    # None: the backbone's first.
    common = {**COMMON, "encoder": ["SelfAttention.q"]}
    assert resolve(["SelfAttention.q"], NAMES, common=common) == {"SelfAttention.q": [NAMES[4], NAMES[5]]}
    assert resolve(["crossattn.q"], NAMES, common=COMMON) == {"crossattn.q": [NAMES[6]]}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ([], [4, 5, 6]),
        (["decoder"], [4, 5]),
        (["encoder.block.1"], [4, 5, 6]),
        (["encoder.block.10"], [4, 6]),
        ([r"[r]block\.\d+"], None),
        (["SelfAttention.q"], [6]),
        (["attn.q"], [6]),
        (["crossattn@.q@"], [4, 5]),
        (["encoder", "decoder"], None),
    ],
)
def test_exclude(exclude: list[str], expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(AddressingError, match="'q' matches .* rules all of them out") as caught:
            resolve(["q"], NAMES, common=COMMON, exclude=exclude)
        assert repr(exclude) in str(caught.value)
    else:
        assert resolve(["q"], NAMES, common=COMMON, exclude=exclude) == {"q": [NAMES[index] for index in expected]}


def test_what_is_below_an_excluded_module_is_excluded() -> None:
    names = ["lm_head", "lm_head.dense", "body.dense"]
    assert resolve(["dense"], names, exclude=["lm_head"]) == {"dense": ["body.dense"]}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("SelfAttention.qq", "'SelfAttention.q'"),
        ("selfattention.q", "'SelfAttention.q'"),
        ("encdecattention", "'EncDecAttention'"),
        ("attn@.qq@", "'attn.q'"),
        ("lmhead", "'lm_head'"),
        ("zzzzzzzz", "The modules' last names are: "),
    ],
)
def test_a_pattern_that_means_nothing_names_what_is_near(pattern: str, hint: str) -> None:
    names = [*NAMES, "decoder.block.0.layer.1.EncDecAttention"]
    with pytest.raises(AddressingError) as caught:
        resolve(["q", pattern], names, common=COMMON)
    assert f"{pattern!r} matches no module" in str(caught.value)
    assert hint in str(caught.value)
    assert "attn.q" in str(caught.value)  # the common names are there to choose from


# --- on real backbones ------------------------------------------------------------------------------------------------


def test_regular_expressions_on_t5() -> None:
    delta_model = attach(
        FAMILIES["t5"].build(),
        modified_modules=[r"[r]encoder\.block\.[0-9]+\.layer\.0\.SelfAttention\.[qv]", r"[r](\d)+\.EncDecAttention\.q"],
    )
    assert [attachment.site for attachment in delta_model.attachments] == [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.v",
        "encoder.block.1.layer.0.SelfAttention.q",
        "encoder.block.1.layer.0.SelfAttention.v",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
    ]


def test_exclude_modules_on_bert() -> None:
    """The key works for every delta type; OpenDelta ignores it for LoRA."""
    for delta_type in ("lora", "adapter"):
        backbone = FAMILIES["bert"].build()
        delta_model = attach(backbone, delta_type, modified_modules=["query"], exclude_modules=["bert.encoder.layer.0"])
        assert [attachment.site for attachment in delta_model.attachments] == ["bert.encoder.layer.1.attention.self.query"]


def test_a_pattern_never_matches_inside_another_delta() -> None:
    backbone = FAMILIES["bert"].build()
    attach(backbone, "adapter")
    with pytest.raises(AddressingError, match="down_proj"):
        attach(backbone, "lora", modified_modules=["down_proj"])
    names = [name for name, _ in backbone_modules(backbone)]
    assert not [name for name in names if "adapter" in name]
    assert common_names(backbone) == common_names(FAMILIES["bert"].build())


def test_overlapping_patterns_modify_a_module_once() -> None:
    delta_model = attach(FAMILIES["bert"].build(), modified_modules=["query", "self.query", "attn.q"])
    assert len(delta_model.attachments) == 2
    assert [len(names) for names in delta_model.targets.values()] == [2, 2, 2]


def test_a_module_that_cannot_carry_lora_is_named() -> None:
    backbone = FAMILIES["t5"].build()
    names = list(backbone.state_dict())
    with pytest.raises(AddressingError, match=r"'encoder\.block\.0\.layer\.0\.SelfAttention' is a T5Attention") as caught:
        attach(backbone, modified_modules=["SelfAttention"])
    assert "It contains q, k, v, o" in str(caught.value)
    assert list(backbone.state_dict()) == names
