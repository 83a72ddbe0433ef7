"""The command line as a user meets it: a subprocess, its output and its exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_fixtures import TOKEN, hub_env
from safetensors import safe_open

from deltaexp.__main__ import main


def deltaexp(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m deltaexp`` in a folder that is not the checkout."""
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:deltaexp", "-m", "deltaexp", *words],
        cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [("lora_rank=4",), ("delta_type=lroa",), ("psuh",), ("-m", "delta_type=lora,adpter"), ("lora_r=4,8",)]
)
def test_a_mistake_is_one_sentence_and_exit_code_2(words: tuple[str, ...], tmp_path: Path) -> None:
    done = deltaexp(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("deltaexp: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_names_every_choice_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from deltaexp.__main__ import main\n"
        "for words in (['--help'], ['lora_rank=4'], ['lora_r=four'], ['backbone=local'], ['-m', 'delta_type=lora,x']):\n"
        "    main(words)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("delta_type=", "adapter", "tiny_t5", "dates", "lora_r=8", "trainer.learning_rate"):
        assert word in done.stdout


def test_help_and_mistakes_are_quick(tmp_path: Path) -> None:
    # The bar is a second on a machine of its own, and this one is shared: what is tested is that nothing heavy is loaded.
    for words in (("--help",), ("lora_rank=4",)):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            deltaexp(*words, cwd=tmp_path)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 2.5


def test_cfg_shows_the_composed_config(tmp_path: Path) -> None:
    done = deltaexp("--cfg", "job", "lora_r=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lora_r: 4" in done.stdout
    assert "name: tiny_t5" in done.stdout


@pytest.mark.slow
def test_a_sweep_makes_verified_deltas_and_a_push_later_works(tmp_path: Path, hub) -> None:
    env = hub_env(hub, tmp_path, TOKEN)
    done = deltaexp(
        "-m", "delta_type=lora,adapter", "trainer=smoke", "task.test_rows=8", "task.train_rows=32", "task.validation_rows=8",
        cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = sorted(path.parent for path in tmp_path.glob("outputs/multirun/*/*/delta/results.json"))
    assert len(folders) == 2
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        assert results["verification"]["hash"] == "match"
        assert results["verification"]["max_logit_difference"] == 0
        with safe_open(folder / "delta_model.safetensors", "pt") as file:
            assert len(list(file.keys())) > 0
    pushed = deltaexp("push", str(folders[0]), "DeltaHub/from-a-test", cwd=tmp_path, env=env)
    assert pushed.returncode == 0, pushed.stderr
    assert "Pushed and verified" in pushed.stdout
    assert set(hub.read("DeltaHub/from-a-test")) >= {"config.json", "delta_model.safetensors", "manifest.json", "README.md"}
    assert TOKEN not in done.stdout + done.stderr + pushed.stdout + pushed.stderr


@pytest.mark.slow
def test_a_folder_of_configs_is_for_plan_and_structure_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine/backbone").mkdir(parents=True)
    (tmp_path / "mine/backbone/other.yaml").write_text("name: other\nsource: embedded:tiny_t5\ntokenizer: byt5\n")
    folder = str(tmp_path / "mine")
    for words in (["structure", "--config-dir", folder], ["structure", f"--config-dir={folder}"], ["structure", "-cd", folder]):
        assert main([*words, "backbone=other"]) == 0
    assert main(["plan", "--config-dir", folder, "backbone=other", "length=8", "target_length=4"]) == 0
    assert "attn.q" in capsys.readouterr().out
    for command in ([], ["plan"], ["structure"]):
        assert main([*command, "--config-dir", str(tmp_path / "none"), "backbone=other"]) == 2
        assert "there is no such folder" in capsys.readouterr().err
