"""Sweeps that are begun, killed, continued, shared by two processes, or fail in part."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaexp.__main__ import main
from deltaexp.checksum import file_sha256
from deltaexp.lab import recovery, sharing
from deltaexp.lab.sweeping import grid, job, record

SMALL = [
    "task.train_rows=20", "task.validation_rows=4", "task.test_rows=4", "task.max_target_length=8", "trainer=smoke",
    "trainer.progress=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    sharing.OF_PROCESS.clear()


def jobs(folder: str = "s") -> list[record.Entry]:
    return list(record.read(folder).values())


def sweep(*words: str) -> int:
    return main(["-m", "hydra.sweep.dir=s", *words])


@pytest.mark.slow
def test_failures_stop_nobody_else_and_are_told(
    small_bert: Path, small_reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One job has no data at first."""
    late = tmp_path / "late"
    words = ["backbone=local", f"backbone.source={small_bert}", "task=sst2", "task.test_split=null", "delta_type=none,bitfit"]
    words += ["trainer=smoke", "trainer.progress=false", f"task.data={late},{small_reviews}"]
    assert sweep(*words, "fail_fast=true") == 1
    assert [entry.status for entry in jobs()] == ["failed", "waiting", "waiting", "waiting"]
    assert "3 were not begun" in capfd.readouterr().err
    assert sweep(*words) == 1
    assert [entry.status for entry in jobs()] == ["failed", "failed", "finished", "finished"]
    said = capfd.readouterr()
    assert "4 jobs in" in said.out
    assert "3 of them to do" in said.out  # what failed is not tried again by itself
    assert f"=== job 4 of 4: delta_type=bitfit task.data={small_reviews}, about" in said.out
    assert "2 of 4 jobs failed:\n  delta_type=none task.data=" in said.err
    assert "Try them again with: python -m deltaexp -m " in said.err
    assert str(jobs()[0].error) in said.err
    log = (Path("s") / jobs()[0].folder / job.LOG).read_text()
    assert str(jobs()[0].error) in log
    assert "\x1b" not in log
    late.symlink_to(small_reviews)
    assert sweep(*words) == 1
    assert "0 of them to do" in capfd.readouterr().out
    assert sweep(*words, "retry=true") == 0
    said = capfd.readouterr()
    assert "2 of them to do" in said.out
    assert [entry.status for entry in jobs()] == ["finished"] * 4
    results = [json.loads((Path("s") / entry.folder / "delta/results.json").read_text()) for entry in jobs()]
    assert [results[n]["digests"]["delta_model.safetensors"] for n in (0, 1)] == [
        results[n]["digests"]["delta_model.safetensors"] for n in (2, 3)
    ]
    assert all((Path("s") / entry.folder / "predictions.jsonl").exists() for entry in jobs())
    assert sharing.OF_PROCESS.loads >= 1


def test_a_single_run_is_no_sweep(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=delta_comparison"]) == 2
    assert "experiment=delta_comparison is a sweep" in capfd.readouterr().err
    assert main(["retry=true"]) == 2
    assert "retry=true is for sweeps" in capfd.readouterr().err
    assert main(["sweep.joint=auto"]) == 2
    assert "sweep.joint=auto is for sweeps: add -m" in capfd.readouterr().err


def test_records_are_read_or_refused(tmp_path: Path) -> None:
    entry = record.Entry("a", "1" * 64, {"seed": 1})
    record.begin("s", "command", ["seed=1"], [entry])
    record.update("s", dataclasses.replace(entry, status="failed", error="no"))
    other = record.Entry("b", "2" * 64, {"seed": 2})
    assert [e.status for e in record.begin("s", "command", ["seed=1,2"], [entry, other]).values()] == ["failed", "waiting"]
    values = json.loads(Path("s/sweep.json").read_text())
    assert values["overrides"] == ["seed=1,2"]
    assert values["jobs"][0] == {
        "folder": "a", "identity": "1" * 64, "overrides": {"seed": 1}, "status": "failed", "error": "no", "seconds": None,
    }  # fmt: skip
    Path("s/sweep.json").write_text("[1]")
    with pytest.raises(recovery.RunError, match="no record of a sweep"):
        record.read("s")


def test_jobs_travel(tmp_path: Path) -> None:
    """What a launcher pickles, in a process that has imported nothing yet."""
    plan = grid.plan(tuple(grid.words_for_hydra(["delta_type=lora,peft", "peft.peft_type=BOFT"])))
    assert plan is not None
    sent = pickle.dumps((job.execute, plan.jobs))
    code = "import pickle, sys; f, jobs = pickle.load(sys.stdin.buffer); print(f.__name__, *(j.delta.delta_type for j in jobs))"
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.split() == [b"execute", b"lora", b"peft"]


def digests(folder: Path) -> dict[str, str]:
    return {path.parents[1].name: file_sha256(path) for path in folder.glob("*/delta/delta_model.safetensors")}


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "deltaexp", "-m", *SMALL, f"hydra.sweep.dir={folder}", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


KILLED = ["delta_type=lora,bitfit", "lora_r=2", "seed=1,2", "trainer.max_steps=30", "trainer.save_every=5", "lora_dropout=0.1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    with start(folder, *KILLED) as process:
        assert process.wait() == 0, process.stdout.read()  # type: ignore[union-attr]
    return folder


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_in_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"

    def checkpoints() -> int:
        return len(list(folder.glob("*/checkpoints/checkpoint-*"))) + 2 * len(list(folder.glob("*/delta")))

    def under_way() -> bool:
        return any(not (path.parents[1] / "delta").exists() for path in folder.glob("*/checkpoints/checkpoint-*"))

    for reached in (1, 3):
        with start(folder, *KILLED) as process:
            while checkpoints() < reached or not under_way():
                assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
    assert len(digests(folder)) < 4
    with start(folder, *KILLED) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "continuing the run in" in said
    assert digests(folder) == digests(undisturbed)
    assert {entry.status for entry in record.read(folder).values()} == {"finished"}


@pytest.mark.slow
def test_what_another_process_does_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The other process holds the first job, and is killed after a while."""
    plan = grid.plan(tuple(grid.words_for_hydra([*SMALL, "seed=1,2"])))
    assert plan is not None
    folder = (tmp_path / "s" / plan.jobs[0].folder).resolve()
    folder.mkdir(parents=True)
    lock = f"lock = filelock.FileLock({str(folder / recovery.LOCK)!r})"
    code = f"import time, filelock; {lock}; lock.acquire(); print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()

        def end_other() -> None:
            while not (tmp_path / "s" / plan.jobs[1].folder / "delta").exists():
                time.sleep(0.1)
            time.sleep(2)
            other.kill()

        threading.Thread(target=end_other).start()
        assert sweep(*SMALL, "seed=1,2") == 0
    assert "waiting for 1 jobs that another process is at work on: seed=1" in capfd.readouterr().out
    assert [entry.status for entry in jobs()] == ["finished", "finished"]


@pytest.mark.slow
def test_the_keyboard_stops_a_sweep_that_goes_on_later(tmp_path: Path) -> None:
    with start(tmp_path / "s", *KILLED) as process:
        while not list(tmp_path.glob("s/*/checkpoints/checkpoint-*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "Continue with: python -m deltaexp -m " in said
    assert {entry.status for entry in jobs()} <= {"waiting", "finished"}


@pytest.mark.slow
def test_two_processes_share_a_sweep(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    both = [start(folder, *KILLED) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert digests(folder) == digests(undisturbed)
    begun = [text.count("=== job") for text in said]
    assert all(begun), begun
    trained = sum(text.count("training for 30 steps") for text in said)
    assert trained == 4  # each of the four by one of the two


@pytest.mark.slow
def test_a_damaged_delta_and_one_of_other_code_are_made_anew(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", *SMALL, "hydra.sweep.dir=s", "seed=1"]
    assert main(words) == 0
    (weights,) = tmp_path.glob("s/*/delta/delta_model.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert main(words) == 1
    assert "is not the file that was saved" in capfd.readouterr().err
    assert main([*words, "retry=true"]) == 0
    assert weights.read_bytes() == good
    assert (weights.parents[1] / "damaged-1").is_dir()
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "code_version", lambda delta_type: "0.0.0+other")
        grid.plan.cache_clear()
        assert main(words) == 0
    grid.plan.cache_clear()
    assert "1 of these jobs were finished here by another version of the code" in capfd.readouterr().out
    both = sorted(tmp_path.glob("s/*/run.json"), key=lambda path: path.stat().st_mtime)
    assert [json.loads(path.read_text())["code"] for path in both] == [recovery.code_version("lora"), "0.0.0+other"]
    assert (both[1].parent / "delta/delta_model.safetensors").read_bytes() == good
