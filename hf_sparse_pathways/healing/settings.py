"""Everything that decides a healing run, with its defaults in one place."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, named, option

TRAINED = ("lora", "weights")
KEPT = ("folded", "lora")
TEACHERS = ("dense", "tuned", "cut")
TERMS = ("lm", "kl", "hidden")

LEARNING_RATES: Mapping[str, float] = {"lora": 1e-3, "weights": 2e-4}
"""By what is trained, for AdamW."""


@dataclass(frozen=True, kw_only=True)
class HealingSettings:
    """How pathways are healed.

    Attributes:
        train: ``"lora"`` (low-rank changes of the kept FFN weights) or ``"weights"`` (the kept FFN
            weights themselves).
        rank: Of the low-rank changes.
        attention: Whether the attention's linear leaves get low-rank changes too. All domains
            share them, so they cannot be folded: needs ``keep="lora"``.
        keep: ``"folded"`` (into the pathway: nothing is added at run time) or ``"lora"`` (a PEFT
            adapter beside the unchanged pathway).
        loss: Terms joined by ``+``, each with an optional factor, as in ``"lm+kl:0.5"``: ``lm``
            (next-token cross-entropy), ``kl`` (divergence from the teacher's predictions),
            ``hidden`` (relative squared distance from the teacher's hidden states).
        teacher: ``"dense"`` (the untouched model), ``"tuned"`` (the dense partner after its own
            training, on the batches that it teaches among others), or ``"cut"`` (the dense model
            at the cut, which has not seen them unless the text was used up before).
        dense_partner: Whether the dense model is trained equally, with the language-modelling
            loss: same steps, same batches, same kind and size of changes.
        dense_first: Fraction of the steps for which the dense model is trained, with the language-
            modelling loss, before its removed neurons are cut out: what the text teaches is learnt
            by all neurons. The dense partner goes on from there too. The learning rate goes on as
            it would have; the optimiser's moments begin anew, since the loss may be another.
        tokens: Training tokens; text that is used up is drawn anew, in another order.
        steps: Instead of ``tokens``: optimiser steps.
        batch_size: Windows per forward pass.
        accumulate: Forward passes per optimiser step.
        max_length: Most tokens per window; by default 512, or the model's positions if fewer.
        learning_rate: Highest rate; by default from ``LEARNING_RATES``.
        warmup: Fraction of the steps over which the rate rises; then it falls as a cosine to 0.
        weight_decay: AdamW's.
        clip: Largest norm of a step's gradient.
        validation_tokens: Tokens on which the best state is chosen.
        validations: How often, evenly over the run.
        patience: Stop after so many validations in a row without a new best; what is cut is not
            stopped before.
        precision: Of the products: ``"model"`` (float32), ``"bfloat16"``, or ``"fastest"``.
        seed: Of the windows, their order, and the low-rank changes' first values.
    """

    train: str = "lora"
    rank: int = 32
    attention: bool = False
    keep: str = "folded"
    loss: str = "lm"
    teacher: str = "dense"
    dense_partner: bool = False
    dense_first: float = 0.0
    tokens: int = 409_600
    steps: int | None = None
    batch_size: int = 2
    accumulate: int = 2
    max_length: int | None = None
    learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    validation_tokens: int = 8192
    validations: int = 10
    patience: int = 3
    precision: str = "fastest"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UnknownNameError: A name is unknown.
            PathwaysError: A number is out of range, or two settings exclude each other.
        """
        _check_name("value of train", self.train, TRAINED)
        _check_name("value of keep", self.keep, KEPT)
        _check_name("teacher", self.teacher, TEACHERS)
        self._check_numbers()
        terms = parse_loss(self.loss)
        if self.attention and self.keep != "lora":
            raise PathwaysError(
                "Changes of the attention belong to all domains and cannot be folded into one "
                f"domain's pathway: choose {named('keep', 'lora')}, or leave the attention out."
            )
        if self.keep == "lora" and self.train != "lora":
            raise PathwaysError(
                f"{named('keep', 'lora')} needs {named('train', 'lora')}: whole weights are no "
                "adapter."
            )
        if self.teacher == "tuned" and not (self.dense_partner and set(terms) - {"lm"}):
            raise PathwaysError(
                f"{named('teacher', 'tuned')} is the dense partner, from which the loss has to "
                f"distil: choose {named('dense_partner', True)} and a loss with 'kl' or 'hidden'."
            )
        if self.teacher == "cut" and not (self.dense_first and set(terms) - {"lm"}):
            raise PathwaysError(
                f"{named('teacher', 'cut')} is the dense model when its neurons are cut out, from "
                f"which the loss has to distil: give {option('dense_first')} and a loss with 'kl' "
                "or 'hidden'."
            )

    def _check_numbers(self) -> None:
        for name in ("rank", "batch_size", "accumulate", "validations", "patience"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("tokens", "validation_tokens"):  # of the first one nothing is predicted
            _check_whole(name, getattr(self, name), 2)
        for name, least in (("steps", 1), ("max_length", 2)):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), least)
        _check_positive("clip", self.clip)
        if self.learning_rate is not None:
            _check_positive("learning_rate", self.learning_rate)
        if not 0.0 <= self.dense_first < 1.0:
            raise PathwaysError(
                f"{option('dense_first')} has to be in [0, 1), got {self.dense_first!r}."
            )
        if not 0.0 <= self.warmup < 1.0 or not 0.0 <= self.weight_decay < math.inf:
            raise PathwaysError(
                f"warmup has to be in [0, 1) and weight_decay not negative, got {self.warmup!r} "
                f"and {self.weight_decay!r}."
            )

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return LEARNING_RATES[self.train] if self.learning_rate is None else self.learning_rate

    @property
    def step_windows(self) -> int:
        """Windows per optimiser step."""
        return self.batch_size * self.accumulate

    def dense_steps(self, steps: int) -> int:
        """Return how many of a run's steps the dense model takes first; the pathway has one.

        Raises:
            PathwaysError: There is one step only, and both shall have a part.
        """
        if not self.dense_first:
            return 0
        if steps == 1:
            raise PathwaysError(
                f"{option('dense_first')} needs two steps or more: raise {option('tokens')} or "
                f"{option('steps')}."
            )
        return min(steps - 1, max(1, round(self.dense_first * steps)))

    @property
    def terms(self) -> dict[str, float]:
        """The loss's terms and their factors."""
        return parse_loss(self.loss)

    def described(self) -> dict[str, Any]:
        """Return the settings as JSON values, for the artefact."""
        return {**asdict(self), "learning_rate": self.rate}


def parse_loss(text: str) -> dict[str, float]:
    """Return the terms of ``"lm+kl:0.5"`` and the like, with their factors.

    Raises:
        PathwaysError: A term is unknown, stands twice, or has no positive factor.
    """
    terms: dict[str, float] = {}
    for part in text.split("+"):
        match = re.fullmatch(r"([a-z]+)(?::(\d+(?:\.\d*)?|\.\d+))?", part.strip())
        factor = float(match[2] or 1.0) if match else 0.0
        if match is None or match[1] not in TERMS or match[1] in terms or factor <= 0.0:
            raise PathwaysError(
                f"loss {text!r} does not fit at {part!r}. Join terms of {', '.join(TERMS)} with "
                "'+', each with an optional factor, as in 'lm+kl:0.5'."
            )
        terms[match[1]] = factor
    return terms


def _check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnknownNameError(kind, name, known)


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise PathwaysError(
            f"{option(name)} has to be a whole number of at least {least}, got {value!r}."
        )


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise PathwaysError(f"{name} has to be a positive number, got {value!r}.")
