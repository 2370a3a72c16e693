"""Which executor a model really runs, and what its fair dense partner is."""

from dataclasses import dataclass
from typing import Any

from hf_sparse_pathways.ffn.executors import EXECUTORS, resolve_executor


@dataclass(frozen=True)
class Execution:
    """The executor that runs, by its registered name, and why it is this one."""

    executor: str
    reason: str


def resolved(model: Any) -> Execution:
    """Return what a model with pathways runs, which need not be what was asked for."""
    told = getattr(model, "execution", None)
    if told is not None:
        return Execution(told.executor, told.reason)
    asked = model.config.executor
    reason = "the default" if asked == "auto" else "asked for"
    return Execution(resolve_executor(asked), reason)


def has_own_dense(executor: str) -> bool:
    """Say whether an executor computes dense passes with its own kernels, too.

    What such an executor gains by kernels is not gained by removing neurons: the pathway is
    compared with its dense pass, any other with the eager one.
    """
    return bool(getattr(EXECUTORS[executor], "packs_dense", executor.startswith("packed")))
