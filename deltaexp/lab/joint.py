"""Several runs trained in one: their batches, side by side, in every forward and backward pass of one backbone.

Each run goes on as if it were alone (`deltaexp.lab.turns`), up to its training. There it puts its delta aside, so that the
next can begin on the same backbone. When all are there, the deltas are attached together, and whenever each run has a batch,
the backbone computes all batches as one (`deltaexp.lab.joint_step`). The losses are the runs' own, and the gradients of their
logits go back through the backbone together. Optimizers, schedules, evaluations and checkpoints are each run's own, as ever.
So a step differs from that of a separate run by rounding only. Parameters of the backbone that runs train, such as those of a
new head, have a run's own values while it is the run's turn.

That is faster where a batch is too small to keep the hardware busy. It is tried out before the first step, and if it is not, or
cannot be, the runs train one after the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaexp.errors import DeltaExpError
from deltaexp.lab import joint_step, smoothing, speeding
from deltaexp.lab.backbones import Backbone
from deltaexp.lab.config import RunConfig
from deltaexp.lab.sharing import Shared
from deltaexp.lab.shortcuts import Shortcuts
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds.chat import Chat
from deltaexp.lab.tasks.kinds.choices import Choices
from deltaexp.lab.tasks.kinds.heads import Headed
from deltaexp.lab.tasks.kinds.language import CausalLM
from deltaexp.lab.tasks.kinds.text import Text
from deltaexp.lab.tasks.kinds.tokens import TokenClassification
from deltaexp.lab.telling import Clock
from deltaexp.lab.turns import Turns
from deltaexp.model import DeltaModel
from deltaexp.routing import route
from deltaexp.structure import backbone_parameters

NEXT_TOKEN, BY_HEAD = (Text, CausalLM, Chat), (Headed, TokenClassification, Choices)
"""Kinds of tasks whose loss is that of the next tokens, and of the labels that a head tells."""
ASSEMBLED, TRAINED, SEPARATELY = "assembled", "trained", "separately"
"""What a run says when it is about to train and when it has trained; and the answer that it trains by itself."""


class Seat(Shared):
    """What a run of a team is given in the place of what the runs share: that, and a place in the team.

    Args:
        shared: What the runs share.
        run: Does the run.
    """

    def __init__(self, shared: Shared, run: Callable[[Shared], Any]) -> None:
        self.shared = shared
        self.turns = Turns(lambda: run(self))
        self.joined: dict[str, Any] | None = None
        self.alone: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        """Makes a context in which the backbone is as this run alone would have it."""
        self.short: Any = None
        """What the run leaves out."""
        self._trainer: Any = None
        self._own: list[nn.Parameter] = []
        self._of_backbone: dict[str, nn.Parameter] = {}
        self._clock: Clock | None = None
        self._leaf: Any = None

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made before, or is made now."""
        return self.shared.once(key, make)

    def backbone(self, config: RunConfig, task: TaskConfig) -> Backbone:
        """Return the backbone."""
        return self.shared.backbone(config, task)

    def untouched(self, config: RunConfig, task: TaskConfig, delta_model: DeltaModel) -> Any:
        """Yield the backbone without the delta."""
        return self.shared.untouched(config, task, delta_model)

    def give_back(self, delta_model: DeltaModel) -> None:
        """Take the delta out of the backbone."""
        self.shared.give_back(delta_model)

    @property
    def delta_model(self) -> DeltaModel:
        """The run's delta."""
        return self._trainer.delta_model

    @property
    def device(self) -> torch.device:
        """Where the run trains."""
        return self._trainer.args.device

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that the run trains: those of the delta's layers, then those of the backbone."""
        return self._own

    def owned(self) -> dict[str, torch.Tensor]:
        """Return the run's values of those parameters of the backbone, by name, while it is not the run's turn."""
        return self.delta_model._ownership.trained

    def hold(self, wanted: bool) -> None:
        """Have the run's values in the backbone's parameters that it trains, or take them out."""
        ownership = self.delta_model._ownership
        if self.delta_model.attached and ownership.active != wanted:
            ownership.exchange(self._of_backbone)

    def train(self, trainer: Any, short: Shortcuts, checkpoint: Path | None, clock: Clock) -> None:
        """Train together with the others, or by itself where that cannot be."""
        self._trainer, self._clock, self.short = trainer, clock, short
        names, parameters = self.delta_model._owned_names(), backbone_parameters(self.delta_model.backbone_model)
        self._of_backbone = {name: parameter for name, parameter in parameters.items() if name in names}
        self.hold(False)
        why = refused(trainer)
        self.hold(True)
        if why is None:
            trainer.create_optimizer()  # while the delta's parameters have names of their own
            trainer.unwrap()
            settings = self.shared.settings()
            short.put_aside()
            if not self.shared.put_aside(self.delta_model):
                self._return(settings)
                why = "something else hangs in the backbone"
        if why is not None:
            clock.console.print(f"  it is trained by itself: {why}", markup=False)
            trainer.train_from(checkpoint)
            return
        layers = [attachment.layer for attachment in self.delta_model.attachments]
        self._own = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        self._own += self._of_backbone.values()
        trainer.alone = lambda: self.alone()
        try:
            self._ask(ASSEMBLED)
            trainer.joint = self
            self.shared.set(settings)
            trainer.train_from(checkpoint)
        finally:
            trainer.joint, trainer.alone = None, contextlib.nullcontext
            short.put_aside()
            self.delta_model.detach()
        settings = self.shared.settings()
        self._ask(TRAINED)
        trainer.accelerator._models.clear()  # an evaluation prepares the model again, if another run has undone that
        self._return(settings)

    def _return(self, settings: Any) -> None:
        """Go on with the backbone as this run had left it."""
        self.shared.take_up(self.device)
        self.shared.set(settings)
        self.attach()
        self.short.take_up()

    def attach(self) -> None:
        """Put the run's delta into the backbone."""
        self.delta_model.attach()
        self.delta_model.freeze_module()

    def loss(self, inputs: joint_step.Batch) -> torch.Tensor | None:
        """Return the loss of a batch, computed with those of the others; None if the run trains by itself from now on."""
        if self._trainer.label_smoother is not None or not inputs[joint_step.LABELS].is_floating_point():
            inputs = smoothing.prepared(inputs, self.delta_model.backbone_model)
        answer = self._ask(inputs)
        if isinstance(answer, str):
            self._trainer.joint = None
            self._trainer.model.train()  # another run has ended with an evaluation
            self.short.take_up()
            return None
        self._leaf = answer
        smoother = self._trainer.label_smoother
        return self.loss_of(answer, inputs, 0.0 if smoother is None else smoother.epsilon)

    def loss_of(self, logits: torch.Tensor, batch: joint_step.Batch, smoothed: float = 0.0) -> torch.Tensor:
        """Return the mean loss of a batch, which is the model's own where no label is smoothed."""
        backbone: Any = self.delta_model.backbone_model
        shifted = isinstance(self._trainer.kind, NEXT_TOKEN) and not backbone.config.is_encoder_decoder
        return joint_step.loss(logits, batch[joint_step.LABELS], shifted, smoothed)

    @contextlib.contextmanager
    def by_itself(self, team: Sequence[Seat], short: Sequence[Any]) -> Iterator[None]:
        """Within this context the backbone is as the run alone would have it.

        Args:
            team: The runs whose layers are in the backbone.
            short: What these leave out together.
        """
        was = self.delta_model._ownership.active
        for part in short:
            part.remove()
        try:
            with joint_step.only(self, team):
                self.short.take_up()
                self.hold(True)
                try:
                    yield
                finally:
                    self.hold(was)
                    self.short.put_aside()
        finally:
            for part in short:
                part.put()

    def backward(self) -> None:
        """Add the gradients that come from the backbone to those that the parameters have by now."""
        leaf, self._leaf = self._leaf, None
        for parameter, gradient in zip(self.trained(), self._ask(leaf.grad), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _ask(self, request: Any) -> Any:
        """Let the others go on, who see nothing here that is trained, and leave their time out of the run's own."""
        assert self._clock is not None
        held = [parameter.grad for parameter in self._own]
        for parameter in self._own:
            parameter.grad = None
            parameter.requires_grad_(False)
        self.hold(False)
        start = time.perf_counter()
        try:
            answer, share = self.turns.ask(request)
        finally:
            self.hold(True)
            for parameter, gradient in zip(self._own, held, strict=True):
                parameter.requires_grad_(True)
                parameter.grad = gradient
        self._clock.leave_out(time.perf_counter() - start - share)
        return answer


def refused(trainer: Any) -> str | None:
    """Say in a clause why a run cannot be trained together with others; None where nothing speaks against it yet."""
    delta_model: DeltaModel = trainer.delta_model
    if not isinstance(trainer.kind, NEXT_TOKEN + BY_HEAD):
        return "its loss is neither that of the next tokens nor that of labels"
    if delta_model._in_place:
        return "it trains parameters of the backbone itself"
    try:
        with route([delta_model]):
            return None
    except DeltaExpError as error:
        return str(error).partition(". ")[0].rstrip(".")


class Team:
    """Runs that are trained in one where that is faster.

    Args:
        runs: Does a run, with what it shares; one for each.
        shared: What they share.
        say: Prints a line.
    """

    def __init__(self, runs: Sequence[Callable[[Shared], Any]], shared: Shared, say: Callable[[str], Any]) -> None:
        self.shared, self.say = shared, say
        self.seats = [Seat(shared, run) for run in runs]
        self._short: list[Any] = []
        """What a step of all leaves out."""

    def go(self) -> Iterator[tuple[int, Any]]:
        """Do the runs, and yield the number of each, with what it returned, when it is over.

        Raises:
            BaseException: What a run raised.
        """
        waiting: list[Seat] = []
        try:
            for seat in self.seats:
                if seat.turns.resume() == ASSEMBLED:
                    waiting.append(seat)
                else:
                    yield self._ended(seat)
            if waiting:
                self._train(waiting)
            for seat in waiting:
                if not seat.turns.over:
                    self._go_on(seat)
                yield self._ended(seat)
        finally:
            for seat in self.seats:
                seat.turns.stop()

    def _ended(self, seat: Seat) -> tuple[int, Any]:
        if seat.turns.error is not None:
            raise seat.turns.error
        return self.seats.index(seat), seat.turns.result

    def _go_on(self, seat: Seat, answer: Any = None, share: float = 0.0) -> Any:
        """Let a run go on until it asks for the next thing; ``share`` are the seconds that were spent for it meanwhile."""
        return seat.turns.resume((answer, share))

    def _train(self, seats: list[Seat]) -> None:
        """Train the runs that are assembled, until each has trained or is over."""
        backbone = self.shared.take_up(seats[0].device)
        names = [(attachment, attachment.attribute) for seat in seats for attachment in seat.delta_model.attachments]
        self._short = _left_out_by_all(seats)
        try:
            for number, seat in enumerate(seats):
                for attachment in seat.delta_model.attachments:
                    attachment.attribute += f"_of_run_{number}"
                seat.attach()
                seat.hold(False)
                seat.alone = partial(seat.by_itself, seats, self._short)
            for part in self._short:
                part.put()
            with speeding.without_denormals():  # as each run says it of its own turns
                self._steps(backbone, seats)
        finally:
            for part in self._short:
                part.remove()
            for seat in seats:
                seat.delta_model.detach()
            for attachment, name in names:
                attachment.attribute = name

    def _steps(self, backbone: nn.Module, live: list[Seat]) -> None:
        """Take the turns of training: a forward and a backward pass for all, and in between what each does by itself."""
        answers: dict[Seat, Any] = dict.fromkeys(live)
        share, step, first = 0.0, None, True
        while live:
            asked = {seat: self._go_on(seat, answers[seat], share) for seat in live}
            live = [seat for seat in live if not (seat.turns.over or isinstance(asked[seat], str))]
            given = {seat: asked[seat] for seat in live}
            _set_trained(live, True)
            start = time.perf_counter()
            if first and live and not self._worth_it(backbone, given):
                self._one_by_one(live)
                return
            first = False
            if live and step is None:
                step = joint_step.forward(backbone, given)
                answers = {seat: step.logits[place].detach().requires_grad_() for seat, place in step.places.items()}
            elif live and step is not None:
                answers, step = joint_step.backward(step, given), None
            _set_trained(live, False)
            share = (time.perf_counter() - start) / max(len(live), 1)

    def _worth_it(self, backbone: nn.Module, batches: dict[Seat, joint_step.Batch]) -> bool:
        """Say whether runs are to be trained together, and print why."""
        if len(batches) == 1:
            return False
        found = joint_step.tried(backbone, batches)
        if isinstance(found, str):
            self.say(f"{len(batches)} runs are trained one by one: {found}")
            return False
        how = f"a step of all takes {found:.2f} of the time of a step of each"
        together = found <= joint_step.FASTER
        self.say(f"{len(batches)} runs are trained {'together' if together else 'one by one'}: {how}")
        if together:
            for seat in batches:
                seat.joined = {"runs": len(batches), "time": round(found, 3)}
        return together

    def _one_by_one(self, seats: list[Seat]) -> None:
        """Have each run trained as if the others were not there."""
        for part in self._short:
            part.remove()
        for seat in seats:
            seat.delta_model.detach()
            seat.alone = contextlib.nullcontext
        for seat in seats:
            seat.attach()
            self._go_on(seat, SEPARATELY)


def _set_trained(seats: Sequence[Seat], trained: bool) -> None:
    for seat in seats:
        for parameter in seat.trained():
            parameter.requires_grad_(trained)


def _left_out_by_all(seats: Sequence[Seat]) -> list[Any]:
    """Return what a step of all leaves out: what every run does, and of frozen blocks the fewest."""
    frozen, single = [seat.short.shortcut for seat in seats], [seat.short.one_token for seat in seats]
    together = all(frozen) and all(part.training for part in frozen)
    few = [seat.short.in_few for seat in seats]
    least = [min(frozen, key=lambda part: part.frozen.depth)] if together else []
    return [*least, *(single[:1] if all(single) else []), *(few[:1] if all(few) else [])]
