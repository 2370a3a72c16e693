"""The processes of one launch (``accelerate launch``, ``torchrun``) that share passes over text.

Every process has the whole model and the same text. It takes every ``count``-th batch, and sums or
lists of results are then put together so that all processes have those of all batches. In which
order numbers are added depends on the number of processes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """One process among those of its launch.

    Attributes:
        index: Which one it is.
        count: How many there are.
        device: Where tensors have to be to be sent.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def of(cls, accelerator: Any) -> Self:
        """Return what an ``Accelerator`` or ``PartialState`` knows; alone without one.

        Raises:
            PathwaysError: It is something else, or its processes cannot talk to each other.
        """
        if accelerator is None:
            return cls()
        try:
            found = cls(accelerator.process_index, accelerator.num_processes, accelerator.device)
        except AttributeError as error:
            raise PathwaysError(
                f"accelerator={accelerator!r} does not fit. Give accelerate.Accelerator() or "
                "accelerate.PartialState(), or leave it out to work in this process alone."
            ) from error
        if found.count > 1 and not dist.is_initialized():
            raise PathwaysError(
                f"The accelerator has {found.count} processes, but torch.distributed is not "
                "initialised, through which they would put their results together. Start the "
                "script with accelerate launch or torchrun."
            )
        return found

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of some items."""
        return items[self.index :: self.count]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors; the given one may be overwritten."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the entrywise maximum of all processes' tensors, likewise."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def gather(self, value: Item) -> list[Item]:
        """Return all processes' values, in the order of the processes; they are pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def check_same(self, value: object, what: str) -> None:
        """Check that all processes were given the same.

        Args:
            value: What has to be equal.
            what: What it stands for, as the begin of a sentence.

        Raises:
            PathwaysError: It differs.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise PathwaysError(
                f"{what} differ between the {self.count} processes of this launch, so that their "
                "results cannot be put together. Give every process the same model, texts and "
                "settings, or leave accelerator= out."
            )

    def check_whole(self, model: nn.Module) -> None:
        """Check that each process can run the model by itself.

        Raises:
            UnsupportedModelError: Its weights are sharded over the processes.
        """
        if self.count > 1 and is_spread(model):
            raise UnsupportedModelError(
                f"The model's weights are sharded over {self.count} processes, so that all of them "
                "have to run the same text. Leave accelerator= out, or load the model whole."
            )

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device)
        dist.all_reduce(moved, operation)
        return moved.to(tensor.device)


def is_spread(model: nn.Module) -> bool:
    """Whether several processes hold a part of a model's weights each."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


ALONE = Processes()
"""A process that does everything itself."""
