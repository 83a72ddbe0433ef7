"""Several processes that train one delta: torchrun on the CPU, with the result of one process."""

import json
import math
import socket
from pathlib import Path

import pytest
import small
import torch
from rich.console import Console
from safetensors.torch import load_file
from small import read_results
from together import MODULE, launch, launch_with, run_together
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from deltaexp.__main__ import main
from deltaexp.lab import processes, schema
from deltaexp.lab.parallel import Share
from deltaexp.lab.run import run

TOGETHER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
COMMON = [
    "trainer.progress=false", "trainer.log_every=1", "trainer.max_steps=6", "trainer.eval_every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides for small backbones without dropout, each with a task whose last batch of an epoch is not full."""
    folder = tmp_path_factory.mktemp("together")
    bert = small.bert(folder / "bert")
    settings = json.loads((bert / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (bert / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1}
    t5 = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=96, bos_token_id=1, **plain, **sizes)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    dates = ["task.train_rows=21", "task.validation_rows=9", "task.test_rows=5", "task.max_target_length=4"]
    data = small.reviews(folder / "reviews", rows=37)

    def local(name: str) -> list[str]:
        return ["backbone=local", f"backbone.name={name}", f"backbone.source={folder / name}"]

    texts = {name: [*dates, *local(name), "backbone.tokenizer=byt5"] for name in ("t5", "gpt2")}
    return {"bert": ["task=sst2", f"task.data={data}", *local("bert")], **texts}


def alone(folder: Path, words: list[str]) -> None:
    run(*schema.composed(words), folder, Console(quiet=True))


def batches(size: int, evaluated: int = 4) -> list[str]:
    return [f"trainer.batch_size={size}", f"trainer.eval_batch_size={evaluated}"]


def compare(one: Path, two: Path) -> None:
    """Check that two runs did the same, up to rounding."""
    first, second = (read_results(folder / "delta") for folder in (one, two))
    logs = [[entry for entry in found["training_log"] if "loss" in entry] for found in (first, second)]
    assert len(logs[0]) == len(logs[1]) == 6
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (a["learning_rate"], a["epoch"]) == (b["learning_rate"], b["epoch"])
    deltas = [load_file(folder / "delta" / "delta_model.safetensors") for folder in (one, two)]
    assert deltas[0].keys() == deltas[1].keys()
    for name, value in deltas[0].items():
        if name.endswith("key.bias"):
            continue  # attention does not depend on it: its gradient is rounding alone, which Adam makes as large as any other
        torch.testing.assert_close(value, deltas[1][name], atol=5e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in first["metrics"]["after"].items():
        assert second["metrics"]["after"][name] == pytest.approx(value, abs=1e-3)
    assert first["base_sha256"] == second["base_sha256"]
    assert first["rows"] == second["rows"]
    assert second["verification"] == {"hash": "match", "max_logit_difference": 0.0, "probe_rows": 4}


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 31])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_make_up_the_global_batches(rows: int, count: int) -> None:
    shares = [Share(range(rows), 2, rank, count) for rank in range(count)]
    steps = [[list(share)[start : start + 2] for start in range(0, len(share), 2)] for share in shares]
    assert {len(batches) for batches in steps} == {shares[0].batches} == {math.ceil(rows / (2 * count))}
    for number in range(shares[0].batches):
        sizes = shares[0].sizes(number)
        real = [row for batches, size in zip(steps, sizes, strict=True) for row in batches[number][:size]]
        assert real == list(range(rows))[number * 2 * count : (number + 1) * 2 * count]
        assert all(batches[number] for batches in steps)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
def test_two_processes_train_what_one_trains(backbones: dict[str, list[str]], tmp_path: Path) -> None:
    words = [*backbones["bert"], *COMMON]
    run_together([(tmp_path / "two", [*words, *batches(4)])], tmp_path)
    alone(tmp_path / "one", [*words, *batches(8)])
    compare(tmp_path / "one", tmp_path / "two")
    results = read_results(tmp_path / "two" / "delta")
    assert (results["processes"], results["global_batch_size"], results["sharding"]) == (2, 8, None)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_all_that_is_trained_is_the_same_in_two_processes(
    sharding: str | None, backbones: dict[str, list[str]], tmp_path: Path
) -> None:
    cases = {
        "tokens": ("t5", [], 1),
        "not before": ("bert", ["trainer.evaluate_before=false"], 1),
        "decoder": ("gpt2", [], 1),
        "accumulated": ("t5", [], 2),
        "by length": ("t5", ["trainer.group_by_length=true"], 1),
        "two rates": ("bert", ["lora_plus_ratio=4"], 1),
        "budget": ("bert", ["delta_type=adalora"], 1),
        "in place": ("bert", ["delta_type=bitfit"], 1),
        "fixed tensors": ("bert", ["delta_type=vera"], 1),
        "smoothed": ("gpt2", ["trainer.label_smoothing=0.1"], 1),
        "best": ("bert", ["trainer.restore_best=true"], 1),
    }
    if sharding is None:
        cases["all"] = ("bert", ["delta_type=full"], 1)
    jobs: list[tuple[Path, list[str]]] = []
    for name, (backbone, more, accumulated) in cases.items():
        words = [*backbones[backbone], *COMMON, *more, f"trainer.gradient_accumulation_steps={accumulated}"]
        how = [f"trainer.sharding={sharding}"] if sharding else []
        jobs.append((tmp_path / f"{name} two", [*words, *batches(4 // accumulated), *how]))
        alone(tmp_path / f"{name} one", [*words, *batches(8 // accumulated, 8)])
    run_together(jobs, tmp_path)
    for name in cases:
        compare(tmp_path / f"{name} one", tmp_path / f"{name} two")
        assert read_results(tmp_path / f"{name} two" / "delta")["sharding"] == sharding


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["null", "fsdp"])
def test_several_processes_go_on_where_they_were_stopped(
    sharding: str, backbones: dict[str, list[str]], tmp_path: Path
) -> None:
    """With dropout, so that it shows whether every process gets its own random state back."""
    words = [
        *backbones["bert"],
        *COMMON,
        "lora_dropout=0.2",
        "trainer.save_every=2",
        f"trainer.sharding={sharding}",
        *batches(4),
    ]
    run_together([(tmp_path / "whole", words), (tmp_path / "parts", words)], tmp_path, stop=("parts", 3))
    assert not (tmp_path / "parts" / "delta").exists()
    run_together([(tmp_path / "parts", [*words, "resume=true"])], tmp_path)
    names = ("whole", "parts")
    first, second = (load_file(tmp_path / name / "delta" / "delta_model.safetensors") for name in names)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=0, rtol=0)
    logs = [[e["loss"] for e in read_results(tmp_path / name / "delta")["training_log"] if "loss" in e] for name in names]
    assert logs[0] == logs[1]


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    done = launch([*MODULE, "lora_rank=4"], tmp_path)
    assert done.returncode != 0
    assert told(done.stderr) == [
        "deltaexp: There is no key 'lora_rank'. Did you mean 'lora_r'? See all keys with: deltaexp --help delta_type=lora"
    ]
    assert not list(tmp_path.iterdir())


def told(text: str) -> list[str]:
    """Return the sentences of deltaexp in what a launcher prints."""
    return [line for line in text.splitlines() if line.startswith("deltaexp: ")]


@pytest.mark.slow
def test_the_command_line_makes_one_folder_and_prints_once(backbones: dict[str, list[str]], tmp_path: Path) -> None:
    words = [*backbones["bert"], *COMMON, *batches(4), "trainer.save_every=2", "trainer.keep_checkpoints=true"]
    done = launch([*MODULE, *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training for 6 steps") == done.stdout.count("\nsaving") == 1
    (folder,) = (tmp_path / "outputs" / "sst2" / "bert" / "lora").iterdir()
    assert (folder / "delta" / "results.json").exists()
    assert len(list((folder / "checkpoints").iterdir())) == 1

    # The same command with resume=true shows what it came to; what fails in the run is told once, too.
    again = launch([*MODULE, *words, "resume=true"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("this run is done already") == 1
    wrong = launch([*MODULE, *words, f"hydra.run.dir={folder}"], tmp_path)
    assert wrong.returncode != 0
    (sentence,) = told(wrong.stderr)
    assert "exists already" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_meets_ends_all(rank: int, tmp_path: Path) -> None:
    """The others are waiting for it, and do not wait for ever."""
    code = tmp_path / "one_fails.py"
    code.write_text(
        "import sys\n"
        "from deltaexp.__main__ import main\n"
        "from deltaexp.errors import DeltaExpError\n"
        "from deltaexp.lab import backbones, processes\n"
        "load = backbones.load\n"
        "def fails(*arguments):\n"
        f"    if processes.rank() == {rank}:\n"
        "        raise DeltaExpError('This one fails.')\n"
        "    return load(*arguments)\n"
        "backbones.load = fails\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["trainer=smoke", "task.train_rows=8", "task.validation_rows=4", "task.test_rows=4", "trainer.progress=false"]
    done = launch([str(code), *words], tmp_path)
    assert done.returncode != 0
    assert told(done.stderr) == ["deltaexp: This one fails."]


@pytest.mark.slow
def test_accelerate_launch_does_the_same(backbones: dict[str, list[str]], tmp_path: Path) -> None:
    words = [*backbones["bert"], *COMMON, *batches(4), f"hydra.run.dir={tmp_path / 'two'}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # Without GPUs, too: with --cpu accelerate starts one process, unless MPI is installed.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m", "deltaexp"]
    done = launch_with(launcher, words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_results(tmp_path / "two" / "delta")["processes"] == 2
    alone(tmp_path / "one", [*backbones["bert"], *COMMON, *batches(8)])
    compare(tmp_path / "one", tmp_path / "two")


def test_what_cannot_be_done_together_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainer.sharding=fsdp"]) == 2
    assert "there is one. Start them with `torchrun" in capsys.readouterr().err
    assert main(["trainer.sharding=fdsp"]) == 2
    assert "Did you mean 'fsdp'?" in capsys.readouterr().err
    for name, value in {**TOGETHER, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_first", lambda: True)  # there is no launcher to ask
    assert main(["-m", "seed=1,2"]) == 2
    assert "Launch each job on its own with torchrun" in capsys.readouterr().err
    assert main(["verify", "somewhere"]) == 2
    assert "works in one process" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main([]) == 2
    assert "trainer.sharding=fsdp here" in capsys.readouterr().err


def test_a_process_is_on_its_own_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for all that runs on them
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert (processes.broadcast("a"), processes.gather("b")) == ("a", ["b"])
    for name, value in TOGETHER.items():
        monkeypatch.setenv(name, value)
    assert (processes.count(), processes.rank(), processes.is_main()) == (2, 1, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_launched_process_is_the_same_as_one_alone(backbones: dict[str, list[str]], tmp_path: Path) -> None:
    words = [*backbones["bert"], *COMMON, *batches(8), "trainer.precision=fp32"]
    run_together([(tmp_path / "launched", words)], tmp_path, processes=1)
    alone(tmp_path / "one", words)
    compare(tmp_path / "one", tmp_path / "launched")
