"""Sweeps whose jobs are executed in other processes: a job that is killed fails alone, one that is interrupted goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_recovery import SMALL, digests

from deltaexp.errors import ConfigError
from deltaexp.lab import schema
from deltaexp.lab.sweeping import grid, launching, record

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes as Linux does")
KILLS = "import os, signal\n\n\ndef die(rows, task):\n    os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.mark.parametrize("name", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_a_launcher_whose_package_is_not_there_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deltaexp.__main__ import main

    monkeypatch.setattr(launching, "find_spec", lambda package: None)
    assert main(["-m", "seed=1,2", f"hydra/launcher={name}"]) == 2
    extra = "slurm" if name.startswith("submitit") else name
    assert f'pip install "deltaexp[{extra}]"' in capsys.readouterr().err


def test_the_keys_of_launchers() -> None:
    words = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.additional_parameters.mail-type=END",
    ]
    launcher = schema.compose_root(words, return_hydra_config=True).hydra.launcher
    assert (launcher.partition, launcher.additional_parameters) == ("gpu", {"requeue": True, "mail-type": "END"})
    with pytest.raises(ConfigError, match="partitio"):
        schema.compose_root(["hydra/launcher=submitit_slurm", "hydra.launcher.partitio=gpu"])
    with pytest.raises(ConfigError, match="Did you mean 'joblib'"):
        grid.plan(("hydra/launcher=jobli", "hydra.mode=MULTIRUN"))


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def sweep(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a sweep in a process of its own."""
    command = [sys.executable, "-m", "deltaexp", "-m", *SMALL, f"hydra.sweep.dir={folder}", *words]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def by_override(folder: Path, key: str) -> dict[Any, record.Entry]:
    return {entry.overrides.get(key): entry for entry in record.read(folder).values()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the delta that a sweep in one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    finish(sweep(folder, "seed=1"))
    ((entry),) = record.read(folder).values()
    return digests(folder / entry.folder)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_job_whose_process_is_killed_fails_alone(launcher: str, alone: dict[str, str], tmp_path: Path) -> None:
    package = {"submitit_local": "submitit"}.get(launcher, launcher)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    (tmp_path / "kills.py").write_text(KILLS)
    words = ["seed=1", "task.prepare=null,kills.py:die", f"hydra/launcher={launcher}"]
    words.append("hydra.launcher.remote.max_retries=0" if launcher == "ray" else "hydra.launcher.n_jobs=2")
    said = finish(sweep(tmp_path / "one", *words), 1)
    entries = by_override(tmp_path / "one", "task.prepare")
    assert {key: entry.status for key, entry in entries.items()} == {None: "finished", "kills.py:die": "failed"}, said
    assert "1 of 2 jobs failed" in said
    assert digests(tmp_path / "one" / entries[None].folder) == alone


def slurm() -> str | None:
    """Return why there is no Slurm to try, None where there is one."""
    if find_spec("submitit") is None:
        return "submitit is not installed"
    if shutil.which("sbatch") is None:
        return "Slurm is not installed"
    answer = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, timeout=30)
    up = {"idle", "mixed", "allocated"} & set(answer.stdout.split())
    return None if up else "no controller of Slurm answers; see scripts/slurm_on_one_machine.sh"


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> Path:
    """Wait until a run below a folder has a checkpoint of this step or a later one, and return the run's folder."""
    for _ in range(2400):
        for path in folder.glob("*/checkpoints/checkpoint-*"):
            if int(path.name.removeprefix("checkpoint-")) >= step:
                return path.parents[1]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no run got to step {step}")


def wait_for_sessions(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if json.loads((run / "run.json").read_text())["sessions"] >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"the run did not begin {count} times")


@LINUX
@pytest.mark.slow
def test_slurm(tmp_path: Path) -> None:
    """A sweep by Slurm, whose jobs are put back into the queue and preempted, ends as one that nothing disturbed."""
    reason = slurm()
    if reason is not None:
        pytest.skip(reason)
    long = ["trainer.max_steps=900", "trainer.save_every=5"]
    finish(sweep(tmp_path / "alone", "seed=1", *long))
    ((undisturbed),) = record.read(tmp_path / "alone").values()

    folder = tmp_path / "slurm"
    (tmp_path / "bad.py").write_text("def fails(rows, task):\n    raise ValueError('no rows of mine')\n")
    words = ["seed=1", "task.prepare=null,bad.py:fails", *long, "hydra/launcher=submitit_slurm", "hydra.launcher.name=tested"]
    process = sweep(folder, *words, "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=3")
    run = wait_for_step(folder, 5, process)
    squeue = ["squeue", "--noheader", "--array", "--name=tested", "--states=RUNNING", "--format=%i"]
    jobs = subprocess.run(squeue, capture_output=True, text=True, check=True).stdout.split()
    for job in jobs:
        subprocess.run(["scontrol", "requeue", job], check=True)
    interruptions = 1
    partitions = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=True).stdout
    if "urgent" in partitions.split():  # as scripts/slurm_on_one_machine.sh makes it
        wait_for_sessions(run, 2, process)  # at its very beginning, so that it is not through before it is preempted
        urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true"]
        subprocess.run(urgent, check=True, capture_output=True)
        interruptions = 2
    said = finish(process, 1)
    entries = by_override(folder, "task.prepare")
    assert {key: entry.status for key, entry in entries.items()} == {None: "finished", "bad.py:fails": "failed"}, said
    assert "no rows of mine" in said
    results = json.loads((run / "delta" / "results.json").read_text())
    assert results["sessions"] >= 1 + interruptions
    assert digests(run) == digests(tmp_path / "alone" / undisturbed.folder)


def test_the_script_for_slurm_refuses_politely(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "scripts" / "slurm_on_one_machine.sh"
    if not script.exists() or not sys.platform.startswith("linux"):
        pytest.skip("needs a checkout, on Linux")
    environ = {"PATH": "/usr/bin:/bin", "SLURM_HERE": str(tmp_path / "here")}  # without the daemons' folder
    for word, told in (("", "Say start, stop or status."), ("start", "takes root|There is no munged: apt-get install")):
        done = subprocess.run(["bash", script, *([word] if word else [])], env=environ, capture_output=True, text=True)
        assert done.returncode == 2
        assert re.search(f"^slurm_on_one_machine: .*({told})", done.stderr)
    assert not (tmp_path / "here").exists()
