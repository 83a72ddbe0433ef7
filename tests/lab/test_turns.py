"""Functions that take turns, each as if it were alone."""

import random
import signal

import numpy as np
import pytest
import torch

from deltaexp.lab.turns import Turns


def numbers(turns: list[Turns], place: int) -> list[float]:
    """Draw from every source, let the others draw, and draw again."""
    torch.manual_seed(place)
    random.seed(place)
    np.random.seed(place)
    found = []
    for step in range(3):
        found += [torch.rand(()).item(), random.random(), float(np.random.rand())]
        if turns:
            assert turns[place].ask((place, step)) == f"{place}.{step}"
    return found


def test_each_draws_what_it_would_draw_alone() -> None:
    turns: list[Turns] = []
    turns += [Turns(lambda place=place: numbers(turns, place)) for place in range(3)]  # type: ignore[misc]
    asked = [one.resume() for one in turns]
    for step in range(3):
        assert asked == [(place, step) for place in range(3)]
        asked = [one.resume(f"{place}.{step}") for place, one in enumerate(turns)]
    assert asked == [None] * 3
    assert all(one.over for one in turns)
    for place, one in enumerate(turns):
        assert one.result == numbers([], place)


def test_what_one_raises_and_what_is_raised_in_it() -> None:
    ended = []

    def work() -> None:
        try:
            with pytest.raises(ValueError, match="no"):
                one.ask("a")
            one.ask("b")
        finally:
            ended.append("tidied")

    one = Turns(work)
    assert one.resume() == "a"
    assert one.resume(ValueError("no")) == "b"
    assert not one.over
    one.stop()
    assert one.over
    assert isinstance(one.error, KeyboardInterrupt)
    assert ended == ["tidied"]
    one.stop()  # changes nothing
    stopped = Turns(lambda: signal.raise_signal(signal.SIGINT))  # Ctrl-C while it is at work
    with pytest.raises(KeyboardInterrupt):
        stopped.resume()
    never = Turns(work)
    never.stop()
    assert not never.over
