"""The arms of a benchmark: plain Transformers, and every executor dense and sparse.

Each executor has a model of its own that shares the weights, so that no copy of kept weights is
made or dropped while the arms alternate. An executor that cannot run, or in whose place another
one runs, is no arm: it is listed with the reason.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.execution import Execution, check_executor
from hf_sparse_pathways.ffn.executors import EXECUTORS, has_own_dense
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import Pathways

DENSE = "dense"
"""The arm that every other one is compared with: plain Transformers, eager."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of computing the model.

    Attributes:
        label: Its name.
        executor: Registered name; None for plain Transformers.
        pathway: The pathway that is on; None for dense.
        sparsity: Fraction of the neurons that is removed.
        removed: Fraction of the FFN's FLOPs that is removed; a bypass counts.
        partner: Label of the dense arm with the same kernels; a dense arm's own.
    """

    label: str
    executor: str | None = None
    pathway: str | None = None
    sparsity: float = 0.0
    removed: float = 0.0
    partner: str = DENSE


@dataclass(frozen=True, kw_only=True)
class ResidentCopies:
    """What an executor keeps in memory for a pathway.

    Attributes:
        executor: The executor.
        pathway: The pathway.
        bytes: Beside the weights.
        seconds: To make it, once.
    """

    executor: str
    pathway: str
    bytes: int
    seconds: float


@dataclass
class Lineup:
    """Everything that is timed, ready to run.

    Attributes:
        dense: The plain model.
        auto: What ``executor="auto"`` chose.
        models: Executor -> a model with pathways that shares the plain one's weights.
        arms: In the order of the tables.
        copies: What is resident, by executor and pathway.
        unavailable: Executor -> why it was not timed.
    """

    dense: Any
    auto: Execution
    models: dict[str, Any] = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)
    copies: list[ResidentCopies] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def model(self, arm: Arm) -> Any:
        """Return the model that an arm runs."""
        return self.dense if arm.executor is None else self.models[arm.executor]

    @property
    def dense_partners(self) -> list[Arm]:
        """The dense arms that others are compared with."""
        partners = {DENSE, *(arm.partner for arm in self.arms)}
        return [arm for arm in self.arms if arm.label in partners]


def line_up(
    dense: Any, pathways: Pathways, timed: Sequence[str], executors: Sequence[str] = ()
) -> Lineup:
    """Make every arm's model, with its copies of kept weights.

    Args:
        dense: A plain causal LM in evaluation mode; its weights are shared.
        pathways: Pathways for it; copies of all of them are made.
        timed: Which of them become arms.
        executors: Names in ``EXECUTORS``, or ``"auto"``; all of them if empty.

    Raises:
        UnknownNameError: An unknown executor.
    """
    for name in executors:
        check_executor(name)
    auto = SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="auto").execution
    names = [auto.executor if name == "auto" else name for name in executors or EXECUTORS]
    lineup = Lineup(dense, auto, arms=[Arm(label=DENSE)])
    for name in dict.fromkeys(names):
        try:
            _add(lineup, name, pathways)
        except PathwaysError as error:
            lineup.unavailable[name] = str(error)
    lineup.arms += _dense_arms(lineup.models)
    lineup.arms += _sparse_arms(lineup.models, pathways, timed)
    return lineup


@torch.no_grad()
def _add(lineup: Lineup, name: str, pathways: Pathways) -> None:
    """Add an executor's model, or the reason why there is none."""
    model = SparsePathwaysForCausalLM.from_dense(lineup.dense, pathways, executor=name).eval()
    execution = model.execution
    if execution.executor != name:
        reason = execution.reason.rstrip(".")
        lineup.unavailable[name] = f"{execution.executor} runs in its place: {reason}"
        return
    model.max_resident_bytes *= len(pathways.domains) + 2
    made = [_make_copies(model, name, pathway) for pathway in pathways.domains]
    for pathway in pathways.domains:
        if (ran := _runs(model, pathway)) != name:
            lineup.unavailable[name] = f"{ran} runs in its place: no room for copies of {pathway}"
            return
    lineup.models[name] = model
    lineup.copies += [copies for copies in made if copies is not None]
    lineup.copies += _dense_copies(model, name, pathways)


def _make_copies(model: Any, executor: str, pathway: str) -> ResidentCopies | None:
    """Make a pathway's copies; return what they take, or None if it needs none."""
    started = clock.now(model.device)
    made = model.prepare(pathway)
    seconds = clock.now(model.device) - started
    held = model.resident.get(pathway, 0)
    if not made:
        return None
    return ResidentCopies(executor=executor, pathway=pathway, bytes=held, seconds=seconds)


def _dense_copies(model: Any, executor: str, pathways: Pathways) -> list[ResidentCopies]:
    """Let dense passes make what they need, and return what that takes."""
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    started = clock.now(model.device)
    model(input_ids=token, use_cache=False, domain=None)
    seconds = clock.now(model.device) - started
    sizes = {name: n for name, n in model.resident.items() if name not in pathways.by_domain}
    return [
        ResidentCopies(executor=executor, pathway=name or DENSE, bytes=size, seconds=seconds)
        for name, size in sizes.items()
    ]


def _runs(model: Any, pathway: str) -> str:
    """Return the executor that a pass in a pathway really gets."""
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    choice = model.enter_forward(pathway, (token,), {})
    model.leave_forward(choice)
    return "masked" if choice.copies is None else str(choice.executor)


def _dense_arms(names: Iterable[str]) -> list[Arm]:
    """Return one arm of the plug-in with no domain on, and those with kernels of their own.

    What such an executor gains by kernels is not gained by removing neurons: the pathway is
    compared with its dense pass, any other with the eager one.
    """
    eager = [name for name in names if not has_own_dense(name)]
    arms = [Arm(label="plug-in, no domain", executor=name) for name in eager[-1:]]
    own = [name for name in names if has_own_dense(name)]
    return arms + [
        Arm(label=f"{name}, dense", executor=name, partner=f"{name}, dense") for name in own
    ]


def _sparse_arms(names: Iterable[str], pathways: Pathways, timed: Sequence[str]) -> list[Arm]:
    return [
        Arm(
            label=f"{name}, {pathway}",
            executor=name,
            pathway=pathway,
            sparsity=pathways.sparsity(pathway),
            removed=1.0 - pathways.flops(pathway),
            partner=f"{name}, dense" if has_own_dense(name) else DENSE,
        )
        for pathway in timed
        for name in names
    ]
