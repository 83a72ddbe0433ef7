"""TensorBoard's events, read back by its own reader."""

from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from deltaexp.lab import public
from deltaexp.lab.run import Outcome


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def text(found: EventAccumulator, name: str) -> str:
    return found.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_the_curves(tracked: Outcome) -> None:
    found = events(tracked.folder.parent)
    for part, prefix in (("train", ""), ("eval", "eval_")):
        name = f"{prefix}loss"
        logged = [(e["step"], pytest.approx(e[name])) for e in tracked.results["training_log"] if name in e]
        assert [(event.step, event.value) for event in found.Scalars(f"{part}/loss")] == logged
        assert [step for step, _ in logged] == [1, 2, 3]


def test_the_hyperparameters_stand_beside_the_final_numbers(tracked: Outcome) -> None:
    found, results = events(tracked.folder.parent), tracked.results
    content = HParamsPluginData.FromString(found.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    values = content.session_start_info.hparams
    assert values["lora_r"].number_value == 8
    assert values["backbone.name"].string_value == "tiny_t5"
    assert not [name for name in values if name.startswith(("tracker", "hub"))]
    (loss,) = found.Scalars("after/loss")
    assert (loss.step, loss.value) == (results["steps"], pytest.approx(results["metrics"]["after"]["loss"]))
    assert found.Scalars("parameters/trainable")[0].value == results["parameters"]["trainable"]
    assert found.Scalars("seconds/train")[0].value == pytest.approx(results["seconds"]["train"])
    assert found.Scalars("peak_memory_bytes/process")[0].value > 1e8


def test_the_texts(tracked: Outcome) -> None:
    found = events(tracked.folder.parent)
    config = text(found, "config")
    assert config.startswith("```yaml\n")
    assert yaml.safe_load(config.strip("`").removeprefix("yaml")) == public.publishable(tracked.results["config"])
    assert f"| loss | {tracked.results['metrics']['before']['loss']} | " in text(found, "results")
