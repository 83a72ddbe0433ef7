"""Processes that are killed, and disks and memory that run out: nothing is lost, and one command goes on."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import Server
from test_recovery import SMALL, digests

from deltaexp import checkpoint
from deltaexp.lab.checkpoints import PREFIX, Checkpoints, fault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes, sets limits and mounts file systems"),
]
GO = "resume=true"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = server.run([*SMALL, "hydra.run.dir=run"], folder)
    assert code == 0, said
    return folder / "run"


def check(folder: Path) -> int:
    """Check that all below a folder which has the name of a delta or of a checkpoint is one; return its newest step."""
    newest = 0
    for delta in folder.rglob("delta"):
        manifest = checkpoint.read_manifest(delta)
        assert manifest is not None
        checkpoint.check_files(delta, manifest, tuple(manifest.files))
        assert {path.name for path in delta.iterdir()} == {*manifest.files, checkpoint.MANIFEST}
        checkpoint.read(delta)
    for saved in folder.rglob("checkpoints"):
        found, _ = Checkpoints(saved).newest()
        # What cannot be used is what was being deleted, and so older than what can.
        steps = {path: int(path.name.removeprefix(PREFIX)) for path in saved.glob(f"{PREFIX}*")}
        usable = {path: step for path, step in steps.items() if fault(path) is None}
        # Where the delta is complete, all of them are deleted, the newest too.
        done = (saved.parent / "delta").exists()
        assert done or not steps or max(steps.values()) == max(usable.values(), default=-1)
        newest = max(newest, steps[found] if found else 0)
    return newest


def test_killed_at_ten_random_moments(server: Server, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"the moments come from random.Random({seed})")
    # Many steps, so that most of the moments lie in the training, and a checkpoint after each.
    moments, words = random.Random(seed), [*SMALL, "trainer.max_steps=40", "trainer.save_every=1", GO]
    start = time.monotonic()
    assert server.run(words, tmp_path / "whole")[0] == 0
    length = time.monotonic() - start
    (whole,) = (tmp_path / "whole").rglob("delta")
    kills, number, newest = 0, 0, 0
    while kills < 10 or not list((tmp_path / str(number)).rglob("delta")):
        if list((tmp_path / str(number)).rglob("delta")):  # that one came through: another run
            assert digests(*(tmp_path / str(number)).rglob("delta")) == digests(whole)
            number, newest = number + 1, 0
        folder = tmp_path / str(number)
        child = server.start(words, folder)
        if kills < 10:
            time.sleep(moments.uniform(0, length))
            os.kill(child, signal.SIGKILL) if Path(f"/proc/{child}").exists() else None
        code, said = server.wait()
        assert code in (0, -signal.SIGKILL), said
        kills += code != 0
        reached = check(folder)
        # Nothing is lost; where the delta is complete, the checkpoints are gone.
        assert reached >= newest or list(folder.rglob("delta"))
        newest = reached
        print(f"killed with a checkpoint after step {reached}" if code else "came through")
    assert digests(*(tmp_path / str(number)).rglob("delta")) == digests(whole)
    assert server.run(words, tmp_path / str(number))[0] == 0
    assert not list((tmp_path / str(number)).rglob(".delta*"))


def say(code: int, said: str) -> str:
    """Return the error that a command ended with: one line and no traceback."""
    assert code == 1, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("deltaexp: ")]
    assert re.search(r"ontinue with: python -m deltaexp .*resume=true", line)
    return line


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"when": "step", "step": 3, "file_size": 20_000}, "the checkpoint after step 2"),
        ({"when": "trained", "file_size": 20_000}, "the checkpoint after step 7"),
        ({"when": "results", "file_size": 2_000}, "the checkpoint after step 7"),
        ({"when": "step", "step": 0, "file_size": 10}, "There is no checkpoint in"),
        ({"when": "step", "step": 3, "memory": 10**8, "take": 10**10}, "the checkpoint after step 2"),
    ],
    ids=str,
)
def test_no_room(limit: dict, told: str, server: Server, whole: Path, tmp_path: Path) -> None:
    line = say(*server.run(SMALL, tmp_path, **limit))
    assert told in line
    reason = "a file would be larger|File too large" if "file_size" in limit else "needs more memory than there is: 10000000000"
    assert re.search(reason, line)
    assert not list(tmp_path.rglob("delta"))
    assert not list(tmp_path.rglob(f".{PREFIX}*"))
    step = check(tmp_path)
    assert f"after step {step}" in line or not step
    code, said = server.run([*SMALL, GO], tmp_path)
    assert code == 0, said
    (delta,) = tmp_path.rglob("delta")
    assert digests(delta) == digests(whole)
    assert {path.name for path in delta.parent.iterdir() if path.name != "deltaexp.log"} == {
        ".hydra", "delta", "run.json", ".run.lock",
    }  # fmt: skip


def test_a_batch_that_is_too_large_for_memory(server: Server, tmp_path: Path) -> None:
    words = [*SMALL, "task.train_rows=4000", "trainer.batch_size=4000"]
    line = say(*server.run(words, tmp_path, when="step", memory=5 * 10**8))
    assert re.search(r"needs more memory than there is: \d+ bytes more could not be had", line)
    assert "halve trainer.batch_size" in line


def test_no_room_at_the_start(server: Server, tmp_path: Path) -> None:
    code, said = server.run(SMALL, tmp_path, when="start", file_size=50)
    assert code == 1
    assert "Traceback" not in said
    assert "deltaexp: The run could not begin: a file would be larger" in said


def test_a_full_disk(server: Server, whole: Path, tmp_path: Path) -> None:
    """A file system in memory which has room for one checkpoint and not for two, until it is made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        words = [*SMALL, f"hydra.run.dir={disk}/run"]
        line = say(*server.run(words, tmp_path))
        assert "the disk is full" in line
        assert "the checkpoint after step 2" in line
        assert check(disk) == 2
        line = say(*server.run([*words, GO], tmp_path))  # there is no more room yet
        assert "the disk is full" in line
        assert check(disk) == 2
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        code, said = server.run([*words, GO], tmp_path)
        assert code == 0, said
        assert digests(disk / "run") == digests(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_the_keyboard(server: Server, whole: Path, tmp_path: Path) -> None:
    words = [*SMALL, "trainer.max_steps=3000", "trainer.save_every=1"]
    child = server.start(words, tmp_path)
    while not list(tmp_path.rglob("checkpoint-*")):
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    code, said = server.wait()
    assert code == 130
    assert "Traceback" not in said
    assert "deltaexp: stopped by the keyboard. Kept: the checkpoint after step" in said
    assert re.search(r"Continue with: python -m deltaexp resume=true .*max_steps=3000", said)
