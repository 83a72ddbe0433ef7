"""What others see of a run: names made from a template, and a config without folders of this machine."""

from pathlib import Path

import pytest

from deltaexp.errors import ConfigError
from deltaexp.hubclient import is_repo_id
from deltaexp.lab.public import is_local, publishable, repository


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("DeltaHub/{delta_type}_{backbone}_{task}", "DeltaHub/lora_t5_base_sst2"),
        ("{task}/{seed}", "sst2/7"),
        ("DeltaHub/plain", "DeltaHub/plain"),
        ("DeltaHub/{{task}}", "DeltaHub/{task}"),  # which is no name, as the check then says
    ],
)
def test_templates(template: str, name: str) -> None:
    assert repository(template, "lora", "t5_base", "sst2", 7) == name


@pytest.mark.parametrize("odd", ["my model", "a/b", "größe", "x--y", "..", "-a-", "a..b", "тест", "a" * 20, "v1.5."])
def test_characters_that_the_hub_refuses_are_replaced(odd: str) -> None:
    name = repository("DeltaHub/{delta_type}-{backbone}-{task}", "lora", odd, odd, 1)
    assert is_repo_id(name), name
    assert name.startswith("DeltaHub/lora")


@pytest.mark.parametrize(
    "template", ["D/{x}", "D/{}", "D/{task!r}", "D/{task:>9}", "D/{task", "D/task}", "D/{task.name}", "D/{0}"]
)
def test_templates_that_cannot_be(template: str) -> None:
    with pytest.raises(ConfigError, match=r"hub\.repo_id"):
        repository(template, "lora", "t5", "sst2", 1)


@pytest.mark.parametrize("text", ["/home/ada/t5", "~/t5", "./t5", "../t5", "..", ".", "C:\\t5", "C:/t5", "\\\\server\\t5"])
def test_folders_are_named_by_their_last_part(text: str) -> None:
    assert is_local(text)
    shown = publishable({"backbone": {"source": text, "list": [text, 1]}})["backbone"]
    assert shown["source"] == shown["list"][0]
    assert shown["source"] in ("t5", "local")


@pytest.mark.parametrize(
    "text",
    [
        "google-t5/t5-base",
        "t5-base",
        "embedded:tiny_t5",
        "package:a/b",
        "generated:dates",
        "last:4",
        "[r]^block",
        "SelfAttention.q",
    ],
)
def test_what_is_no_folder_stays(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"a": text, "b": {"c": [text, None, 1.5, True]}}
    assert publishable(values) == values


def test_a_relative_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert publishable({"source": "models/bert"}) == {"source": "models/bert"}
    (tmp_path / "models" / "bert").mkdir(parents=True)
    assert publishable({"source": "models/bert/"}) == {"source": "bert"}
