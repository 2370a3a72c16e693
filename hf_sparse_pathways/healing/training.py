"""The loop: AdamW under a cosine, the best state on validation text kept.

Each step is the mean over the scored tokens of its windows, in as many forward passes as
``accumulate`` says: how a step is cut into passes does not change it. Nothing is drawn while
training (no dropout), so a run is decided by its student, text and settings.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hf_sparse_pathways.discovery.precision import calibration_precision
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import Window, count_tokens, make_batches
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.healing.batches import TrainingText
from hf_sparse_pathways.healing.checkpoints import Checkpoints, Groups
from hf_sparse_pathways.healing.losses import Objective, count_scored
from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.reading import NUMBER, check_kinds

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A run after some steps.

    Attributes:
        step: Optimiser steps.
        tokens: Training tokens.
        seconds: Time spent, validation included.
        training: Mean training loss since the point before, all terms; None at the start.
        validation: Next-token loss on the validation text, nats per token.
    """

    step: int
    tokens: int
    seconds: float
    training: float | None
    validation: float


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in its steps a run is: what was taken of them, what that came to, and how long."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Which part of a run's steps is taken. The learning rate of a step is decided by the step.

    Attributes:
        label: For the progress bar.
        start: What another run has done of the steps.
        end: Number of the step before which it ends; None to go to the last.
        fork: Number of the step before which the state is kept, for another run to go on from.
    """

    label: str
    start: Position = Position()
    end: int | None = None
    fork: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run gave beside the trained model.

    Attributes:
        curve: The run's; the lowest validation loss is that of the state that is left.
        fork: The state that was asked for on the way, by parameter; empty if none was.
        forked: Where that was.
    """

    curve: tuple[CurvePoint, ...]
    fork: Mapping[str, Tensor]
    forked: Position


@dataclass
class _Record:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # summed since the last point, over ``steps`` steps
    steps: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    forked: Position = Position()

    @property
    def best(self) -> CurvePoint:
        return min(self.curve, key=lambda point: point.validation)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "_Record":
        """Return a record from JSON values.

        Raises:
            TypeError: A value is of the wrong kind.
            KeyError: One is missing.
        """
        curve = [CurvePoint(**point) for point in data["curve"]]
        record = cls(**{**data, "curve": curve, "forked": Position(**data["forked"])})
        for place in map(vars, (record, record.forked, *curve)):
            check_kinds(place, ("step", "tokens"), int)
            check_kinds(place, ("seconds",), *NUMBER)
        for point in map(vars, curve):
            check_kinds(point, ("validation",), *NUMBER)
            check_kinds(point, ("training",), *NUMBER, None)
        check_kinds(vars(record), ("steps",), int)
        check_kinds(vars(record), ("loss",), *NUMBER)
        if not curve or min(record.step, record.tokens, record.steps) < 0:
            raise TypeError("no curve, or a negative number")
        return record


def train(
    model: Any,
    text: TrainingText,
    objective: Objective,
    settings: HealingSettings,
    checkpoints: Checkpoints,
    stage: Stage,
) -> Trained:
    """Train a model's parameters that require a gradient, in place; the best state is left in it.

    Args:
        model: On one device; its other parameters are frozen.
        text: The windows.
        objective: What is minimised.
        settings: How.
        checkpoints: Where an interrupted run is stored, and goes on from.
        stage: The part of the steps that is taken.

    Raises:
        PathwaysError: The loss is NaN or infinite.
    """
    run = _Run(model, text, objective, settings, checkpoints, stage)
    run.resume()
    done, total = run.record.tokens, sum(map(count_tokens, text.steps[: run.end]))
    with tqdm(total=total, initial=done, desc=stage.label, unit="tok", disable=None) as bar:
        if not run.record.curve:
            run.validate()
        while not run.finished:
            before = run.record.tokens
            run.advance()
            bar.update(run.record.tokens - before)
            bar.set_postfix_str(f"validation {run.record.curve[-1].validation:.4f}")
    run.store()
    restore(model, run.best)
    return Trained(curve=tuple(run.record.curve), fork=run.fork, forked=run.record.forked)


class _Run:
    """One training run."""

    def __init__(
        self,
        model: Any,
        text: TrainingText,
        objective: Objective,
        settings: HealingSettings,
        checkpoints: Checkpoints,
        stage: Stage,
    ) -> None:
        self.model, self.text, self.objective = model, text, objective
        self.settings, self.checkpoints = settings, checkpoints
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.accelerator = Accelerator()
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.rate, weight_decay=settings.weight_decay
        )
        self.optimizer: Any = self.accelerator.prepare(optimizer)
        total = len(text.steps)
        warmup = min(total - 1, round(settings.warmup * total))
        self.schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
        self.stage, self.end = stage, total if stage.end is None else stage.end
        start = stage.start
        self.record = _Record(step=start.step, tokens=start.tokens, seconds=start.seconds)
        self.best: dict[str, Tensor] = {}
        self.fork: dict[str, Tensor] = {}
        self._set_rate()

    @property
    def finished(self) -> bool:
        """Whether every step was taken, or the last validations brought nothing.

        Both who go on from a fork are judged by what they did since.
        """
        curve, fork = self.record.curve, self.stage.fork or 0
        since = sum(point.step > max(fork, self.stage.start.step) for point in curve)
        stale = len(curve) - 1 - curve.index(self.record.best)
        return self.record.step >= self.end or min(stale, since) >= self.settings.patience

    def advance(self) -> None:
        """Take a step, validate and fork if it is time, and store if it is time."""
        started = time.monotonic()
        windows = self.text.steps[self.record.step]
        self.record.loss += self._step(windows)
        self.record.steps += 1
        self.record.step += 1
        self.record.tokens += count_tokens(windows)
        self.record.seconds += time.monotonic() - started
        total, times = len(self.text.steps), self.settings.validations
        done = self.record.step
        if done == self.end or done * times // total > (done - 1) * times // total:
            self.validate()
        if done == self.stage.fork:
            at = self.record
            at.forked = Position(step=done, tokens=at.tokens, seconds=at.seconds)
            self.fork = {n: p.detach().clone() for n, p in self.parameters.items()}
        if self.checkpoints.due:
            self.store()

    def _step(self, windows: Sequence[Window]) -> float:
        """Change the parameters by one batch's gradient; return its mean loss."""
        batches = list(make_batches(windows, self.settings.batch_size))
        scored = sum(map(count_scored, batches))
        total = 0.0
        for batch in batches:
            with self._precision():
                loss = self.objective(self.model, batch) / scored
            self.accelerator.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise PathwaysError(
                f"The training loss is {total} at step {self.record.step}. Lower the learning "
                "rate, or check the weights."
            )
        self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return total

    def _precision(self) -> AbstractContextManager[None]:
        """Return a context for one use of the weights: autocast remembers how it has cast them."""
        return calibration_precision(self.model, self.settings.precision)

    def validate(self) -> None:
        """Measure the validation loss, and keep the state if it is the best."""
        started = time.monotonic()
        record = self.record
        with self._precision():
            loss = mean_loss(
                self.model, self.text.validation, None, (), batch_size=self.settings.batch_size
            )
        if not math.isfinite(loss):
            raise PathwaysError(f"The validation loss is {loss} at step {record.step}.")
        record.seconds += time.monotonic() - started
        point = CurvePoint(
            step=record.step,
            tokens=record.tokens,
            seconds=record.seconds,
            training=record.loss / record.steps if record.steps else None,
            validation=loss,
        )
        record.curve.append(point)
        record.loss, record.steps = 0.0, 0
        if record.best is point:
            self.best = {n: p.detach().clone() for n, p in self.parameters.items()}

    def store(self) -> None:
        """Store everything that the rest of the run depends on."""
        state = self.optimizer.optimizer.state
        groups: Groups = {"parameters": dict(self.parameters), "best": self.best, "fork": self.fork}
        for moment in _MOMENTS:
            groups[moment] = {
                name: state[parameter][moment]
                for name, parameter in self.parameters.items()
                if parameter in state
            }
        self.checkpoints.store(asdict(self.record), groups)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from what was stored, if anything was.

        Raises:
            ArtefactError: It is damaged; then nothing has changed.
        """
        stored = self.checkpoints.load(self.parameters)
        if stored is None:
            return
        record, groups = stored
        try:
            self.record = _Record.of(record)
        except (KeyError, TypeError) as error:
            raise self.checkpoints.damaged(f"its record lacks or misuses {error}") from error
        begun = self.record.step > self.stage.start.step
        missing = {"parameters", "best", *(_MOMENTS if begun else ())} - groups.keys()
        if missing:
            raise self.checkpoints.damaged(f"it has no {min(missing)}")
        state = self.optimizer.optimizer.state
        restore(self.model, groups["parameters"])
        for name, parameter in self.parameters.items():
            self.best[name] = groups["best"][name].to(parameter.device)
            if begun:
                moments = {m: groups[m][name].to(parameter.device) for m in _MOMENTS}
                taken = float(self.record.step - self.stage.start.step)
                state[parameter] = {"step": torch.tensor(taken), **moments}
        self.fork = {n: t.to(self.accelerator.device) for n, t in groups.get("fork", {}).items()}
        self._set_rate()

    def _set_rate(self) -> None:
        """Bring the schedule to the record's step."""
        step = self.record.step
        self.schedule.last_epoch = step
        groups = self.optimizer.optimizer.param_groups
        for group, base, factor in zip(
            groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)


@torch.no_grad()
def restore(model: Any, state: Mapping[str, Tensor]) -> None:
    """Give a model's parameters the values that they had, in place."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


def describe_plan(
    model: nn.Module, text: TrainingText, settings: HealingSettings, label: str
) -> dict[str, Any]:
    """Return everything that decides a run, for ``Checkpoints``."""
    digest = partial(hashlib.sha256, usedforsecurity=False)
    windows = [[window.ids for window in step] for step in text.steps]
    validation = [window.ids for window in text.validation]
    weights = [float(p.detach().flatten()[::1009].double().sum()) for p in model.parameters()]
    return {
        "label": label,
        "settings": settings.described(),
        "training": digest(str(windows).encode()).hexdigest(),
        "validation": digest(str(validation).encode()).hexdigest(),
        "weights": weights,
    }
