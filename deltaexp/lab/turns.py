"""Functions that take turns: each in a thread of its own, of which one at a time is awake.

A function goes on until it asks for something, and sleeps until it is answered. Meanwhile the others go on, each with the
random states, of torch, NumPy and Python, and the count of accumulated batches that it left: to a function it is as if it were
alone. (Plain generators would do, if everything between a run and the step that it is to wait in were one.)
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState


class Turns:
    """One function, and how far it is.

    Args:
        function: What is called in a thread of its own.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.over = False
        """Whether the function has returned or raised."""
        self.result: Any = None
        self.error: BaseException | None = None
        self._request: Any = None
        self._answer: Any = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._awake = False
        # A second Ctrl-C ends the process, whatever is asleep in it.
        self._thread = threading.Thread(target=self._work, daemon=True)

    def resume(self, answer: Any = None) -> Any:
        """Answer what was asked for, or begin; return what is asked for next, None if the function is over.

        An answer that is an exception is raised where it was asked.
        """
        self._answer, self._awake = answer, True
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        self._awake = False
        return self._request

    def ask(self, request: Any) -> Any:
        """Within the function: ask for something, let others go on, and return the answer."""
        state = _state()
        self._request = request
        self._back.release()
        self._go.acquire()
        _set(state)
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def stop(self) -> None:
        """Have a function that has begun end as after Ctrl-C."""
        if self._awake:  # whoever waited for it was interrupted
            self._back.acquire()
            self._awake = False
        while not self.over and self._thread.ident is not None:
            self.resume(KeyboardInterrupt())

    def _work(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error  # whoever resumed it raises it, or not
        self.over, self._request = True, None
        self._back.release()


def _state() -> list[Any]:
    """Return what belongs to the process, and is to be as a function left it when it goes on."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return [torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(), dict(GradientState._shared_state)]


def _set(state: list[Any]) -> None:
    cpu, cuda, python, numpy, accumulated = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)
    GradientState._shared_state.clear()
    GradientState._shared_state.update(accumulated)
