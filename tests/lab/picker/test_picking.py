"""What the page is answered: modules, patterns, parameters as `deltaexp plan` counts them, words for the shell, files."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import transformers

from deltaexp import registry
from deltaexp.errors import ConfigError, DeltaExpError
from deltaexp.lab import plan, schema
from deltaexp.lab.picker.documentation import documentation
from deltaexp.lab.picker.picking import Picker, State

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Picker:
    """The embedded T5, with a rank of 4."""
    return Picker(["lora_r=4"], tmp_path_factory.mktemp("picked"))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Picker:
    """An encoder of MiniLM's shape of which there is nothing but the config."""
    folder = tmp_path_factory.mktemp("minilm")
    transformers.BertConfig(**MINILM, architectures=["BertModel"]).save_pretrained(folder)
    return Picker(["backbone=local", f"backbone.source={folder}", "backbone.name=mini", "task=rte"], folder / "picked")


def row_of(picker: Picker, *path: str) -> int:
    """Return the number of the first row whose names end so, from the root down."""
    for number in range(len(picker.outline.rows)):
        steps: list[str] = []
        at: int | None = number
        while at is not None:
            steps.insert(0, picker.outline.rows[at].numbers[0])
            at = picker.outline.rows[at].parent
        if tuple(steps[-len(path) :]) == path:
            return number
    raise AssertionError(path)


def click(picker: Picker, state: State, *path: str, side: int = 0) -> dict[str, Any]:
    row = row_of(picker, *path)
    return picker.show(state, {"row": row, "digits": [None] * len(picker.outline.folds(row)), "side": side})


def test_it_starts_with_what_was_typed(tiny: Picker) -> None:
    about = tiny.about()
    assert about["state"] == {"delta_type": "lora", "keys": {"lora_r": "4"}, "patterns": None}
    assert (about["backbone"], about["parameters"]) == ("tiny_t5", 1_033_984)
    assert {one["name"] for one in about["types"]} == set(registry.known())
    assert json.dumps(about)
    answer = tiny.show(State(**about["state"]))
    assert answer["counts"]["trainable"] == 8192
    assert answer["lists"] == [[{"pattern": f"attn.{one}", "count": 4, "error": None} for one in "qv"]]
    assert (answer["override"], answer["command"]) == (None, "python -m deltaexp delta_type=lora lora_r=4")
    own = [key["name"] for key in answer["keys"] if key["own"]]
    assert own[:2] == ["lora_r", "lora_alpha"]
    assert answer["keys"][own.index("lora_r") + 4]["about"] == "Rank r of the update."


def test_patterns_that_were_typed(tmp_path: Path) -> None:
    picker = Picker(["delta_type=parallel_adapter", "modified_modules=[attn,attn,ff.w1,ff.w2]"], tmp_path)
    assert picker.start.patterns == [["attn", "ff.w1"], ["attn", "ff.w2"]]
    assert picker.choice(picker.start).override == "'modified_modules=[attn,attn,ff.w1,ff.w2]'"


def test_a_click_names_what_is_chosen(minilm: Picker) -> None:
    state = State("lora")
    answer = click(minilm, state, "attention", "output", "dense")
    assert answer["error"] is None
    assert state.patterns == answer["patterns"] == [["attn.q", "attn.v", "attn.proj"]]
    assert [proposal["kind"] for proposal in answer["proposals"]] == ["common names", "names", "regular expression"]
    assert answer["override"] == "'modified_modules=[attn.q,attn.v,attn.proj]'"
    assert answer["marks"][0]["rows"][row_of(minilm, "self", "query")] == list(range(6))
    click(minilm, state, "attention", "output", "dense")  # again
    assert state.patterns == [["attn.q", "attn.v"]]
    row = row_of(minilm, "self", "query")
    digits = [None] * len(minilm.outline.folds(row))
    digits[minilm.outline.folds(row).index(6)] = 2
    minilm.show(state, {"row": row, "digits": digits, "side": 0})  # one of the folded blocks
    assert state.patterns == [["attn.v", r"[r]layer\.[01345]\.attention\.self\.query"]]
    minilm.show(state, {"pattern": "attn.q", "side": 0})
    minilm.show(state, {"pattern": "attn.q", "side": 0})
    click(minilm, state, "self", "value")
    assert state.patterns == [[]]
    assert "modified_modules is an empty list" in minilm.show(state)["error"]


def test_a_click_that_no_pattern_can_name_changes_nothing(tiny: Picker) -> None:
    state = State("lora", {}, [["attn.q"]])
    answer = click(tiny, state, "lm_head")
    assert "lm_head cannot be chosen: exclude_modules or layers leave it out" in answer["error"]
    assert "patterns" not in answer
    assert state.patterns == [["attn.q"]]


def test_what_cannot_carry_the_delta_is_said_at_its_row(tiny: Picker) -> None:
    answer = tiny.show(State("lora", {}, [["attn.q", "attn"]]))
    assert "goes on Linear or Conv1D modules" in answer["error"]
    assert answer["counts"] is None
    assert "command" not in answer
    faults = {tiny.outline.rows[row].kind for row in answer["faults"]}
    assert faults == {"T5LayerSelfAttention"}
    assert all("is a T5LayerSelfAttention" in text for text in answer["faults"].values())
    # The backbone is left without a delta.
    assert tiny.show(State("lora"))["counts"]["trainable"] == 16_384


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"lora_r": "0"}, "lora_r is 0; it must be at least 1."),
        ({"lora_r": "four"}, "lora_r is 'four', which is not a whole number."),
        ({"lora_r": "4,8"}, "several values"),
        ({"lora_r": "["}, "is no override"),
        ({"lora_rank": "4"}, "no key 'lora_rank'. Did you mean 'lora_r'?"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"layers": "7"}, "this backbone has 2 blocks, 2 blocks, counted from 0"),
    ],
)
def test_mistakes_in_keys_are_the_command_lines(keys: dict[str, str], sentence: str, tiny: Picker) -> None:
    assert sentence in tiny.show(State("lora", keys))["error"]


def test_pairs(tiny: Picker) -> None:
    state = State("parallel_adapter")
    answer = tiny.show(state)
    assert [[entry["pattern"] for entry in entries] for entries in answer["lists"]] == [["attn", "ff.w1"], ["attn", "ff.w2"]]
    answer = tiny.show(state, {"pattern": "attn", "side": 0})
    assert "here are 1 patterns of where it reads (ff.w1) and 2 of where it writes (attn, ff.w2)" in answer["error"]
    answer = tiny.show(state, {"pattern": "attn", "side": 1})
    assert answer["override"] == "'modified_modules=[ff.w1,ff.w2]'"


def test_a_type_on_the_whole_backbone(tiny: Picker) -> None:
    answer = tiny.show(State("soft_prompt", {"soft_token_num": "4"}))
    assert (answer["whole"], answer["lists"], answer["counts"]["trainable"]) == (True, [[]], 512)


def test_previews_are_the_engines(minilm: Picker) -> None:
    state = State("lora")

    def seen(pattern: str) -> tuple:
        answer = minilm.preview(state, pattern)
        return answer.get("count"), answer.get("read"), answer["error"]

    assert seen("query") == (6, "end of a name", None)
    assert seen("attn.q") == (6, "common name", None)
    assert seen("@attn.q@")[0] == 6
    assert seen(r"[r]layer\.[0-2]\..*query") == (3, "regular expression", None)
    assert seen("all-linear")[:2] == (37, "common name")
    assert "is not a regular expression: missing )" in seen("[r]query(")[2]
    assert "matches no module of this backbone. The nearest names are 'query'" in seen("quary")[2]
    assert "matches no module" in minilm.preview(State("lora", {"common_structure": "true"}), "query")["error"]
    assert minilm.preview(State("lora", {"layers": "last:2"}), "query")["count"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("delta_type", ["adapter", "bitfit", "adalora"])
def test_counts_are_those_of_plan(delta_type: str, tiny: Picker) -> None:
    words = [f"delta_type={delta_type}", "trainer.batch_size=1", "task.max_source_length=8", "task.max_target_length=4"]
    found = plan.make(*schema.composed(words))
    counts = tiny.show(State(delta_type))["counts"]
    assert counts["parts"] == found.parts
    assert (counts["trainable"], counts["saved"]) == (found.parameters("trainable"), found.parameters("saved"))
    assert counts["bytes"] == 4 * counts["saved"]


def test_new_heads_are_counted_as_in_plan(minilm: Picker) -> None:
    counts = minilm.show(State("lora"))["counts"]
    assert counts["parts"]["new in the backbone"]["trainable"] == 384 * 2 + 2
    assert counts["trainable"] == 6 * 2 * 8 * 2 * 384 + 770


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(State("lora"), marks=pytest.mark.slow),
        State("lora", {"lora_r": "2", "lora_r_pattern": "{attn.q:4}", "layers": "last:1"}, [["attn.q", r"[r](wi_0|wo)"]]),
        pytest.param(State("adapter", {"bottleneck_dim": "4"}, [[r"[r]block\.[01]\..*wo"]]), marks=pytest.mark.slow),
        pytest.param(State("parallel_adapter", {}, [["ff.w1"], ["ff.w2"]]), marks=pytest.mark.slow),
    ],
    ids=lambda state: state.delta_type,
)
def test_command_and_file_compose_to_what_was_chosen(state: State, tmp_path: Path) -> None:
    picker = Picker(["experiment=seed_example", "trainer.epochs=2", "task.train_rows=7"], tmp_path)
    if state.delta_type != "lora":  # the experiment has keys of its own type
        picker = Picker(["trainer.epochs=2", "task.train_rows=7", "trainer=smoke"], tmp_path)
    wanted = picker._delta_config(state)
    run, delta = schema.composed(shlex.split(picker.choice(state).command)[3:])
    assert delta == wanted
    saved = picker.save(state, "mine", replace=False)
    assert saved["command"] == f"python -m deltaexp --config-dir {tmp_path} experiment=mine"
    assert schema.composed(["experiment=mine"], [str(tmp_path)]) == (run, delta)
    assert run.trainer.epochs == 2
    # Its first line says what it is where choices are listed.
    assert "chosen by `deltaexp pick`" in schema.choices("experiment", [str(tmp_path)])["mine"]


@pytest.mark.slow
def test_groups_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    keys = "name: mine, kind: seq2seq, data: x, inputs: [a], target: b, metrics: [exact_match]"
    text = f"# @package _global_\n# Mine.\ntask: {{{keys}}}\n"
    (tmp_path / "task" / "mine.yaml").write_text(text)
    picker = Picker(["task=mine"], tmp_path, [str(tmp_path)])
    state = State("lora", {}, [["attn.q"]])
    command = picker.choice(state).command
    assert command == f"python -m deltaexp --config-dir {tmp_path} task=mine delta_type=lora 'modified_modules=[attn.q]'"
    picker.save(state, "chosen", False)
    found = schema.composed(["experiment=chosen"], [str(tmp_path)])
    assert found == schema.composed(shlex.split(command)[5:], [str(tmp_path)])


@pytest.mark.slow
def test_files_are_never_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Picker) -> None:
    monkeypatch.setattr(tiny, "folder", tmp_path)
    path = tmp_path / "experiment" / "mine.yaml"
    first, second = State("lora", {}, [["attn.q"]]), State("lora", {}, [["attn.k"]])
    assert tiny.save(first, "mine", False)["path"] == str(path)
    text = path.read_text()
    assert tiny.save(second, "mine", False) == {"exists": str(path)}
    assert path.read_text() == text
    assert tiny.save(second, "mine", True)["path"] == str(path)
    assert "modified_modules: [attn.k]" in path.read_text()
    for name in ("", "../mine", "a/b", ".hidden", "a b", "x" * 101, "mine\n"):
        with pytest.raises(ConfigError, match="is no name for an experiment"):
            tiny.save(first, name, True)
    with pytest.raises(DeltaExpError, match="matches no module"):
        tiny.save(State("lora", {}, [["nothing"]]), "other", True)
    assert [found.name for found in path.parent.iterdir()] == ["mine.yaml"]
    monkeypatch.setattr(tiny, "folder", path)
    with pytest.raises(DeltaExpError, match="cannot be written"):
        tiny.save(first, "mine", True)


def test_defaults_that_are_not_there_leave_the_rest_to_be_chosen(tmp_path: Path) -> None:
    transformers.BertConfig(**{**MINILM, "num_hidden_layers": 1}, architectures=["BertModel"]).save_pretrained(tmp_path)
    picker = Picker(["backbone=local", f"backbone.source={tmp_path}", "backbone.name=mini", "task=rte", "layers=5"], tmp_path)
    state = picker.start
    assert "this backbone has 1 blocks" in picker.show(state)["error"]
    state.keys = {}
    assert picker.show(state)["error"] is None


def test_documentation_of_keys() -> None:
    told = documentation(registry.get("lora"))
    assert told["lora_r"] == "Rank r of the update."
    assert told["modified_modules"].startswith("Patterns of the modules to modify")


@pytest.mark.slow
def test_a_large_backbone_is_a_small_page(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=32, vocab_size=99, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    words = ["backbone=local", f"backbone.source={tmp_path}", "backbone.name=big", "task=e2e_nlg"]
    picker = Picker(words, tmp_path)
    assert len(json.dumps(picker.about())) < 20_000
    state = State("lora", {"lora_r": "1"})
    answer = click(picker, state, "self_attn", "o_proj")
    assert state.patterns == [["attn.q", "attn.v", "attn.proj"]]
    assert answer["counts"]["layers"] == 96
