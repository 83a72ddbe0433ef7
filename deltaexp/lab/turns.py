"""Functions that take turns in one thread: each goes on until it asks for something, and rests until it is answered.

Meanwhile the others go on, each with the random states, of torch, NumPy and Python, and the other states of the process that it
left: to a function it is as if it were alone. (Generators would do, if every function between a run and the step in which it
waits were one. These are greenlets, which need none of them to know.)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from greenlet import getcurrent, greenlet


class Turns:
    """One function, and how far it is.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.begun = self.over = False
        """Whether the function has been called, and whether it has returned or raised."""
        self.result: Any = None
        self.error: BaseException | None = None
        self._fibre = greenlet(self._work)

    def resume(self, answer: Any = None) -> Any:
        """Answer what was asked for, or begin; return what is asked for next, None if the function is over.

        An answer that is an exception is raised where it was asked.

        Raises:
            KeyboardInterrupt: If somebody stopped the function.
        """
        self._fibre.parent = getcurrent()
        request = self._fibre.switch(answer) if self.begun else self._fibre.switch()
        if self.over and isinstance(self.error, KeyboardInterrupt):
            raise self.error
        return request

    def ask(self, request: Any) -> Any:
        """Within the function: ask for something, let others go on, and return the answer."""
        state = _state()
        answer = self._fibre.parent.switch(request)
        _set(state)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        """Have a function that has begun end as after Ctrl-C."""
        while self.begun and not self.over:
            with contextlib.suppress(KeyboardInterrupt):
                self.resume(KeyboardInterrupt())

    def _work(self) -> None:
        self.begun = True
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error  # whoever resumed it raises it, or not
        self.over = True


def _state() -> list[Any]:
    """Return what belongs to the process or the thread, and is to be as a function left it when it goes on."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    draws = torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()
    return [*draws, dict(GradientState._shared_state), autocast, torch.is_grad_enabled()]


def _set(state: list[Any]) -> None:
    cpu, cuda, python, numpy, accumulated, autocast, grad = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)
    GradientState._shared_state.clear()
    GradientState._shared_state.update(accumulated)
    for kind, enabled, dtype in autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_grad_enabled(grad)
