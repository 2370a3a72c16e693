"""The passes of a profile: a domain's windows through the decoder, once per group of blocks.

Several processes each take a part of the batches. When a group is done, their sums are added and
stored once for all; until then each stores its own, so that an interrupted run goes on.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.collectors import (
    BlockCollector,
    Collector,
    OfBlock,
    Workspaces,
)
from hf_sparse_pathways.discovery.grams import GramSource
from hf_sparse_pathways.discovery.passes import Finished, evaluation_mode, run_decoder
from hf_sparse_pathways.discovery.profiles import DomainProfile
from hf_sparse_pathways.discovery.resumption import Resumption
from hf_sparse_pathways.discovery.statistics import BlockStatistics, check_statistics
from hf_sparse_pathways.discovery.weights import weight_digest
from hf_sparse_pathways.discovery.windows import Batch, Window, make_batches
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.processes import Processes

Own = TypeVar("Own", bound=Collector)
Block = TypeVar("Block", bound=OfBlock)


@dataclass(frozen=True)
class Sample:
    """What was drawn of one domain's text."""

    windows: tuple[Window, ...]
    validation: tuple[Window, ...]
    routing: tuple[Window, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Collection:
    """Everything that the passes over all domains' text have in common.

    Attributes:
        model: A causal LM.
        groups: Its FFN blocks, those together whose Gram matrices fit into memory.
        batch_size: Windows per forward pass.
        grams: Whether to take Gram matrices.
        inputs: Whether these hold the blocks' inputs.
        precision: Of the model's products.
        processes: Those that share the batches.
    """

    model: nn.Module
    groups: tuple[tuple[FfnBlock, ...], ...]
    batch_size: int
    grams: bool
    inputs: bool
    precision: str
    processes: Processes

    def collect(
        self, domain: str, sample: Sample, work_folder: "str | PathLike[str] | None"
    ) -> DomainProfile:
        """Run a domain's windows through the decoder, once per group of blocks."""
        plan = self.plan(sample)
        self.processes.check_same(plan, f"Domain {domain!r}: model, text or settings")
        passes = self._passes(sample, work_folder)
        statistics: list[BlockStatistics] = []
        matrices: list[GramSource] = []
        with passes.progress(f"profile {domain}", len(self.groups)) as bar:
            for number, group in enumerate(self.groups):
                name = f"{number:04d}"
                for index, collector in enumerate(
                    passes.collect_group(self._collectors(group), name, bar)
                ):
                    check_statistics(domain, collector.block.name, collector.statistics)
                    statistics.append(collector.statistics)
                    if collector.accumulator is not None:
                        stored = passes.together.stored_gram(name, index, collector.block.d_ff)
                        matrices.append(stored or collector.accumulator.gram())
        return DomainProfile(
            blocks=tuple(statistics),
            provenance=sample.provenance,
            grams=tuple(matrices),
            windows=sample.windows,
            validation=sample.validation,
            routing=sample.routing,
        )

    def sum_up(
        self,
        domain: str,
        sample: Sample,
        work_folder: "str | PathLike[str] | None",
        what: str,
        make: Callable[[FfnBlock], Block],
    ) -> Iterator[Block]:
        """Yield other sums of every block, those of a group together.

        Args:
            domain: Whose windows.
            sample: They.
            work_folder: Where unfinished sums are stored.
            what: The name of the sums.
            make: Returns a block's collector.
        """
        passes = self._passes(sample, work_folder, what)
        with passes.progress(f"{what} {domain}", len(self.groups)) as bar:
            for number, group in enumerate(self.groups):
                yield from passes.collect_group(list(map(make, group)), f"{number:04d}", bar)

    def sum_through(
        self,
        domain: str,
        sample: Sample,
        work_folder: "str | PathLike[str] | None",
        what: str,
        collectors: Sequence[Own],
    ) -> Sequence[Own]:
        """Return collectors with sums over one pass through the whole decoder; as ``sum_up``."""
        passes = self._passes(sample, work_folder, what)
        with passes.progress(f"{what} {domain}", 1) as bar:
            return passes.collect(collectors, what, bar)

    def _passes(
        self, sample: Sample, work_folder: "str | PathLike[str] | None", what: str | None = None
    ) -> "Passes":
        plan = self.plan(sample) if what is None else {**self.plan(sample), "sums": what}
        batches = list(make_batches(sample.windows, self.batch_size))
        return Passes.of(self, batches, plan, work_folder)

    def _collectors(self, group: Sequence[FfnBlock]) -> list[BlockCollector]:
        spaces = Workspaces()
        return [
            BlockCollector(block, spaces, gram=self.grams, inputs=self.inputs) for block in group
        ]

    def plan(self, sample: Sample) -> dict[str, Any]:
        """Return everything that decides the sums, for ``Resumption``."""
        tokens = hashlib.sha256(str([window.ids for window in sample.windows]).encode())
        return {
            "tokens": tokens.hexdigest(),
            "weights": weight_digest(self.model),
            "groups": [len(group) for group in self.groups],
            "batch_size": self.batch_size,
            "grams": self.grams,
            "inputs": self.inputs,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class Passes:
    """The passes over one domain's text.

    Attributes:
        collection: What all have in common.
        batches: How many there are.
        own_batches: Those of this process.
        together: Where the sums of all processes are stored.
        own: Where unfinished sums of this process are.
    """

    collection: Collection
    batches: int
    own_batches: Sequence[Batch]
    together: Resumption
    own: Resumption

    @classmethod
    def of(
        cls,
        collection: Collection,
        batches: Sequence[Batch],
        plan: dict[str, Any],
        work_folder: "str | PathLike[str] | None",
    ) -> "Passes":
        """Share the batches, and find where sums are stored."""
        processes, together = collection.processes, Resumption(work_folder, plan)
        own = together
        if processes.count > 1:
            part = {"process": processes.index, "processes": processes.count}
            own = Resumption(work_folder, {**plan, **part})
        return cls(collection, len(batches), processes.share(batches), together, own)

    def progress(self, what: str, passes: int) -> Any:
        """Return a progress bar over the tokens of this process, in some passes."""
        total = batch_tokens(self.own_batches) * passes
        silent = None if self.collection.processes.is_first else True
        return tqdm(total=total, desc=what, unit="tok", disable=silent)

    def collect_group(self, collectors: Sequence[Block], name: str, bar: Any) -> Sequence[Block]:
        """Return collectors of a group of blocks with the sums over the batches of all processes.

        A pass ends behind the group's last block.

        Args:
            collectors: One per block of the group, in layer order; changed in place.
            name: Under which their sums are stored.
            bar: Told of every token of this process.
        """
        ends = collectors[-1].block is not self.collection.groups[-1][-1]
        return self.collect(collectors, name, bar, collectors if ends else ())

    def collect(
        self, collectors: Sequence[Own], name: str, bar: Any, last: Sequence[OfBlock] = ()
    ) -> Sequence[Own]:
        """Return any collectors; as ``collect_group``.

        Args:
            collectors: Changed in place.
            name: Under which their sums are stored.
            bar: Told of every token of this process.
            last: A pass ends when these have seen their blocks; by default it does not.
        """
        if self.collection.processes.count == 1:
            self._run(collectors, name, bar, last)
        elif not self._restore(collectors, name):
            self._run(collectors, name, bar, last)
            self._combine(collectors, name)
        return collectors

    def _run(
        self, collectors: Sequence[Collector], name: str, bar: Any, last: Sequence[OfBlock]
    ) -> None:
        """Run this process's batches through the decoder."""
        model = self.collection.model
        done = began = self.own.resume(name, collectors)
        bar.update(batch_tokens(self.own_batches[:done]))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(all_dense())
            stack.enter_context(evaluation_mode(model))
            for collector in collectors:
                for handle in collector.attach():
                    stack.callback(handle.remove)
            for handle in _stop_after(last):
                stack.callback(handle.remove)
            for batch in self.own_batches[done:]:
                for collector in collectors:
                    collector.begin(batch)
                run_decoder(model, batch)
                bar.update(batch_tokens([batch]))
                done += 1
                self.own.store_sometimes(name, collectors, done)
        if done > began:
            self.own.store(name, collectors, done)

    def _restore(self, collectors: Sequence[Collector], name: str) -> bool:
        """Restore the sums of all processes, if every process finds them finished."""
        finished = self.together.stored(name, collectors) == self.batches
        if not all(self.collection.processes.gather(finished)):
            return False
        self.together.resume(name, collectors)
        return True

    def _combine(self, collectors: Sequence[Collector], name: str) -> None:
        """Add the sums of all processes, and store them once."""
        processes = self.collection.processes
        for collector in collectors:
            collector.combine(processes)
        if processes.is_first:
            self.together.store(name, collectors, self.batches)
        processes.gather(name)  # from here on the others find them, too
        self.own.delete(name, len(collectors))


def cut_groups(
    blocks: Sequence[FfnBlock], sizes: Sequence[int], room: int
) -> list[tuple[FfnBlock, ...]]:
    """Cut blocks, in layer order, into groups whose sums have room together, or are one block's."""
    groups: list[list[FfnBlock]] = [[]]
    used = 0
    for block, size in zip(blocks, sizes, strict=True):
        if groups[-1] and used + size > room:
            groups.append([])
            used = 0
        groups[-1].append(block)
        used += size
    return [tuple(group) for group in groups]


def batch_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of tokens, padding excluded."""
    return sum(int(batch.mask.sum()) for batch in batches)


def _stop_after(collectors: Sequence[OfBlock]) -> Iterator[Any]:
    """Hook the blocks so that a forward pass ends when the last of them has been seen."""
    seen = [collector.batches for collector in collectors]

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
        if all(
            collector.batches > before for collector, before in zip(collectors, seen, strict=True)
        ):
            seen[:] = [collector.batches for collector in collectors]
            raise Finished

    for collector in collectors:
        yield collector.block.outgoing.register_forward_pre_hook(stop)
