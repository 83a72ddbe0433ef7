"""What is typed becomes the jobs of a sweep, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from deltaexp.__main__ import main
from deltaexp.errors import ConfigError
from deltaexp.lab import schema
from deltaexp.lab.sweeping import grid


def planned(*words: str, search_path: tuple[str, ...] = ()) -> grid.Plan:
    plan = grid.plan(tuple(grid.words_for_hydra(words)), search_path)
    assert plan is not None
    return plan


def made(plan: grid.Plan, *keys: str) -> list[tuple]:
    return [tuple(job.overrides.get(key) for key in keys) for job in plan.jobs]


def test_a_key_goes_to_the_types_that_have_it() -> None:
    plan = planned("delta_type=lora,bitfit,adapter", "seed=1,2", "lora_r=4,8", "bottleneck_dim=3")
    assert made(plan, "delta_type", "seed", "lora_r", "bottleneck_dim") == [
        ("lora", 1, 4, None), ("lora", 1, 8, None), ("lora", 2, 4, None), ("lora", 2, 8, None),
        ("bitfit", 1, None, None), ("bitfit", 2, None, None), ("adapter", 1, None, 3), ("adapter", 2, None, 3),
    ]  # fmt: skip
    assert [job.delta.delta_type for job in plan.jobs[3:5]] == ["lora", "bitfit"]
    assert plan.jobs[3].delta.lora_r == 8  # type: ignore[attr-defined]
    assert [note.partition(";")[0] for note in plan.notes] == ["lora_r goes to lora", "bottleneck_dim goes to adapter"]
    assert len({job.identity for job in plan.jobs} | {job.folder for job in plan.jobs}) == 16
    assert plan.jobs[0].run.task.save_predictions


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["delta_type=bitfit,ia3", "lora_r=4,8"], "None of bitfit, ia3 has a key 'lora_r'; it belongs to delta_type=lora."),
        (["delta_type=bitfit", "lora_r=4,8"], "delta_type=bitfit has no key 'lora_r'"),
        (["delta_type=lora,bitfit", "lora_rr=4,8"], "Did you mean 'lora_r'"),
        (
            ["delta_type=lora,adpter"],
            "The job delta_type=adpter cannot run: There is no delta_type 'adpter'. Did you mean 'adapt",
        ),
        (["delta_type=lora,adapter", "trainer.max_stepz=1,2"], "Did you mean 'max_steps'"),
        (["lora_r=4", "seed=1,-1"], "The job lora_r=4 seed=-1 cannot run: A seed is negative"),
        (["seed=1,x"], "The job seed=x cannot run"),
        (["retry=true,false"], "retry is about the sweep as a whole"),
        (["trainer.learning_rate=interval(0,1)"], "a range without steps"),
        (["+lora_r=4", "seed=1,2"], "write lora_r=VALUE"),
        (["~lora_r", "seed=1,2"], "write lora_r=VALUE"),
        (["seed=1,2", "sweep.name=a/b"], "it becomes a folder's name"),
        (["seed=1,2", "hydra.sweep.subdir=x"], "cannot be chosen"),
    ],
)
def test_mistakes(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_arrive_as_they_were_typed() -> None:
    lists = planned("modified_modules=[SelfAttention.q],['SelfAttention.v',SelfAttention.k]", "tracker.tags=['it\\'s, so']")
    assert [job.delta.modified_modules for job in lists.jobs] == [["SelfAttention.q"], ["SelfAttention.v", "SelfAttention.k"]]
    assert {tuple(job.run.tracker.tags) for job in lists.jobs} == {("it's, so",)}
    null = planned("trainer.learning_rate=null,1e-3", "task.name='a b'")
    assert [job.run.trainer.learning_rate for job in null.jobs] == [null.jobs[0].delta.learning_rate, 1e-3]
    assert null.jobs[0].run.task.name == "a b"
    free = planned("delta_type=peft,lora", "peft.peft_type=BOFT,IA3", "trainer.learning_rates={lora_B: 1e-2}")
    assert [job.delta.delta_type for job in free.jobs] == ["peft", "peft", "lora"]
    assert [job.delta.peft["peft_type"] for job in free.jobs[:2]] == ["BOFT", "IA3"]  # type: ignore[attr-defined]
    assert free.jobs[2].run.trainer.learning_rates == {"lora_B": 0.01}


def test_jobs_that_make_the_same_delta_are_one() -> None:
    plan = planned("seed=1,1,2", "trainer.log_every=10,20", "lora_r=8")
    assert made(plan, "seed", "trainer.log_every") == [(1, 10), (2, 10)]
    assert "4 jobs would make the same delta" in plan.notes[-1]


def test_a_sweep_is_found_again_by_what_it_trains() -> None:
    plan = planned("delta_type=lora,bitfit", "seed=1,2", "trainer.progress=false")
    same = planned("seed=2,1", "delta_type=bitfit,lora", "retry=true", "tracker=none", "fail_fast=true")
    assert same.name == plan.name
    assert planned("delta_type=lora,bitfit", "seed=1,3").name != plan.name
    assert planned("seed=1,2", "sweep.name=mine").name.startswith("mine-")
    assert plan.command == "python -m deltaexp -m delta_type=lora,bitfit seed=1,2 trainer.progress=false"


def test_backbones_stay_together() -> None:
    plan = planned("seed=1,2", "backbone.dtype=float32,bfloat16", "delta_type=lora,ia3")
    assert [job.run.backbone.dtype for job in plan.jobs] == ["float32"] * 4 + ["bfloat16"] * 4


def test_an_experiment_is_a_grid_that_may_be_typed_over(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\ntrainer:\n  max_steps: 5\nhydra:\n  sweeper:\n    params:\n"
        '      delta_type: lora,adapter\n      seed: 1,2\n      lora_r: 4\n      trainer.batch_size: "8"\n'
    )
    plan = planned("experiment=mine", search_path=(str(tmp_path),))
    assert made(plan, "delta_type", "seed", "lora_r") == [
        ("lora", 1, 4),
        ("lora", 2, 4),
        ("adapter", 1, None),
        ("adapter", 2, None),
    ]
    assert {(job.run.trainer.max_steps, job.run.trainer.batch_size) for job in plan.jobs} == {(5, 8)}
    assert plan.name.startswith("mine-")
    assert plan.command == f"python -m deltaexp -m --config-dir {tmp_path} experiment=mine"
    over = planned("experiment=mine", "delta_type=bitfit", "seed=7", search_path=(str(tmp_path),))
    assert made(over, "delta_type", "seed") == [("bitfit", 7)]
    assert "lora_r goes to none" in over.notes[0]


@pytest.mark.parametrize("name", schema.choices("experiment"))
def test_every_experiment_composes(name: str) -> None:
    words = [f"experiment={name}"]
    root = schema.compose_root(words, return_hydra_config=True)
    if root.hydra.sweeper.params and root.hydra.sweeper._target_ == grid.SWEEPER:
        assert len(planned(*words).jobs) > 1
    else:
        schema.composed(words)


def test_the_comparison_has_many_types_and_the_baselines() -> None:
    jobs = planned("experiment=delta_comparison").jobs
    types = {job.delta.delta_type for job in jobs}
    assert {"none", "full"} < types
    assert len(types) >= 10
    assert len(jobs) == 3 * len(types)
    assert len({job.run.trainer.max_steps for job in jobs}) == 1
    rates = {job.delta.delta_type: job.run.trainer.learning_rate for job in jobs}
    assert (rates["full"], rates["lora"], rates["ia3"]) == (1e-3, 1e-2, 2e-2)
    (typed,) = planned("experiment=delta_comparison", "delta_type=full", "seed=1", "trainer.learning_rate=1e-4").jobs
    assert typed.run.trainer.learning_rate == 1e-4


def test_the_jobs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "delta_type=lora,bitfit", "lora_r=4", "seed=1,2", "--cfg", "job"]) == 0
    first, *jobs, note = capsys.readouterr().out.splitlines()
    assert first.startswith("4 jobs in {sweep} = sweep-")
    assert jobs[1].partition(": ")[2] == "delta_type=lora lora_r=4 seed=2"
    assert note.startswith("lora_r goes to lora")
    assert main(["--cfg", "job", "experiment=delta_comparison"]) == 0
    assert "max_steps: 60" in capsys.readouterr().out
    assert main(["-m", "experiment=equal_budget", "--cfg", "job"]) == 2


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys\nfrom deltaexp.lab.sweeping import grid\n"
        "assert len(grid.plan(tuple(grid.words_for_hydra(['seed=1,2']))).jobs) == 2\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom deltaexp.lab import report, tracking\n"
        "from deltaexp.lab.tracking import sweep\n"
        "tracking.summarise_sweep(Path(sys.argv[1]))\n"
        "assert sweep.table(Path(sys.argv[1])) == []\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
