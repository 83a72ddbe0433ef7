"""Runs of the command line in processes of their own that are forked from one which has torch imported already.

A forked child is a process like any other: it can be killed, and limits can be set for it. It is started as a script, reads
one job a line, answers with the number of the child's process and, when that has ended, with its exit code and its output.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any


class Server:
    """The process that forks."""

    def __enter__(self) -> "Server":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.communicate()

    def start(self, words: list[str], folder: Path, **limit: Any) -> int:
        """Start ``deltaexp words`` in a folder; return the number of its process."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"words": words, "folder": str(folder), "limit": limit}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> tuple[int, str]:
        """Wait for the end of what was started; return its exit code, negative for a signal, and all that it printed."""
        return tuple(self._answer())

    def run(self, words: list[str], folder: Path, **limit: Any) -> tuple[int, str]:
        """Start and wait."""
        self.start(words, folder, **limit)
        return self.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """Fork a child for every job."""
    import datasets  # noqa: F401
    import torch
    import transformers.models.byt5.tokenization_byt5
    import transformers.models.t5.modeling_t5  # noqa: F401

    import deltaexp.lab.run  # noqa: F401
    from deltaexp.lab import schema

    schema.composed([])  # which imports every delta type, PEFT with them

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 1)
            os.dup2(write, 2)
            os._exit(work(**job))
        os.close(write)
        print(child, flush=True)
        texts: list[str] = []
        reader = threading.Thread(target=lambda read=read, texts=texts: texts.append(os.fdopen(read).read()))
        reader.start()
        status = os.waitpid(child, 0)[1]
        reader.join()
        print(json.dumps([os.waitstatus_to_exitcode(status), texts[0]]), flush=True)


def work(words: list[str], folder: str, limit: dict[str, Any]) -> int:
    """Be the child: run the command line, with less of the disk or of memory from some moment on."""
    import traceback

    # A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from deltaexp.__main__ import main

    os.chdir(folder)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if limit:
        plan(**limit)
    try:
        return main(words)
    except BaseException:
        traceback.print_exc()
        return 99


def plan(when: str, file_size: int | None = None, memory: int | None = None, take: int = 0, step: int = 0) -> None:
    """Let a limit begin at a moment of the run.

    Args:
        when: "start", "step" (the beginning of number ``step`` + 1), "trained" or "results".
        file_size: Bytes that a file may have from then on.
        memory: Bytes that the process may have more than it has then.
        take: Bytes that it asks for then.
        step: Which step.
    """
    import torch
    from transformers import TrainerCallback

    from deltaexp import checkpoint
    from deltaexp.lab import training

    def begin() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        if memory is not None:
            status = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize:"))
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.RLIM_INFINITY))
        torch.empty(take, dtype=torch.uint8)

    class Limit(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if when == "step" and state.global_step == step:
                begin()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if when == "trained":
                begin()

    build, add_files = training.build, checkpoint.add_files

    def build_with_limit(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(Limit())
        return trainer

    def add_with_limit(*arguments: Any) -> Any:
        if when == "results":
            begin()
        return add_files(*arguments)

    training.build, checkpoint.add_files = build_with_limit, add_with_limit  # type: ignore[assignment]
    if when == "start":
        begin()


if __name__ == "__main__":
    serve()
