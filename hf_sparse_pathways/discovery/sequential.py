"""Block after block: each is pruned and repaired on what the pruned blocks before it really give.

Two streams of hidden states run over the calibration text, the dense model's and the pruned one's,
one decoder layer at a time. At a layer, with its own FFN still dense, the pruned stream gives the
activation a and input x; the difference of the two streams behind the layer, e, is what earlier
layers have left wrong (``layer_output.py``). The block is then pruned and repaired towards
``y* = W a + e``, so that it also undoes what it can of their error, and the pruned stream moves on
through the repaired block.

Source: sequential least squares on the pruned model's own inputs as in Frantar & Alistarh 2023,
"SparseGPT", arXiv:2301.00774; the target in the residual stream is ours.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.arms import AnyProbe, Arm
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.layer_output import LayerOutput, Passed
from hf_sparse_pathways.discovery.layerwise import LayerRunner, stacked_layers
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.probes import Observer, Seen, attached, make_change
from hf_sparse_pathways.discovery.trials import computing
from hf_sparse_pathways.discovery.windows import Batch, Window, make_batches
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.ffn.clusters import Kept

MOST_KEPT = 2 * 10**9
"""Most bytes of activations that are kept to spare a layer's second run."""

_EXCERPT = 64
"""Tokens of text on which it is checked that layers can be run one at a time."""


def prune_sequentially(model: nn.Module, arms: Sequence[Arm]) -> Mapping[str, tuple[Kept, ...]]:
    """Make several pathways at once, layer by layer.

    Args:
        model: A dense causal LM; it is as it was afterwards.
        arms: The pathways to be made.

    Raises:
        UnsupportedModelError: The model's layers cannot be run one at a time.
    """
    blocks = find_blocks(model)
    streams = _Streams.of(arms)
    leafwise = all(arm.leafwise for arm in arms)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(all_dense())
        stack.enter_context(evaluation_mode(model))
        runner = LayerRunner(model, stacked_layers(model, [block.layer for block in blocks]))
        runner.check(_excerpt(streams.batches[0]))
        for index, layer in enumerate(
            tqdm(runner.layers, desc="prune", unit="layer", disable=None)
        ):
            own = [(number, block) for number, block in enumerate(blocks) if block.layer is layer]
            step = _Layer(runner, index, own, streams) if own else None
            dense = streams.dense if leafwise else streams.run_dense(runner, index)
            if step is not None and dense[0] is not None:
                step.learn(dense[0])
            for position, arm in enumerate(arms):
                if step is None:
                    streams.run_pruned(runner, index, position)
                else:
                    step.prune(position, arm, dense)
            streams.dense = dense
    return {arm.name: tuple(arm.blocks) for arm in arms}


@dataclass
class _Streams:
    """Hidden states behind the last layer that is done.

    Attributes:
        batches: All arms' text, each batch once.
        chosen: Per arm, the batches that it uses.
        dense: The dense model's hidden states, per batch; None before the first layer.
        pruned: Per arm and batch, the pruned model's.
    """

    batches: list[Batch]
    chosen: list[list[int]]
    dense: list[Tensor | None]
    pruned: list[dict[int, Tensor | None]]

    @classmethod
    def of(cls, arms: Sequence[Arm]) -> "_Streams":
        batches = list({id(batch): batch for arm in arms for batch in arm.batches}.values())
        places = {id(batch): place for place, batch in enumerate(batches)}
        chosen = [[places[id(batch)] for batch in arm.batches] for arm in arms]
        nothing: list[Tensor | None] = [None] * len(batches)
        return cls(batches, chosen, nothing, [dict.fromkeys(mine) for mine in chosen])

    def run_dense(self, runner: LayerRunner, index: int) -> list[Tensor | None]:
        """Return the dense stream behind a layer."""
        pairs = zip(self.batches, self.dense, strict=True)
        return [runner.run(index, batch, hidden) for batch, hidden in pairs]

    def run_pruned(self, runner: LayerRunner, index: int, position: int) -> None:
        """Move an arm's stream behind a layer, as the layer is now."""
        stream = self.pruned[position]
        for number in self.chosen[position]:
            stream[number] = runner.run(index, self.batches[number], stream[number])

    def sampled(self, position: int, wanted: int) -> Sequence[int]:
        """Return batches from all over an arm's text, of about as many tokens, or more."""
        numbers = self.chosen[position]
        tokens = sum(int(self.batches[number].mask.sum()) for number in numbers)
        return numbers[:: max(1, tokens // wanted)]


class _Layer:
    """One decoder layer with its FFN blocks (nearly always one)."""

    def __init__(
        self,
        runner: LayerRunner,
        index: int,
        blocks: Sequence[tuple[int, FfnBlock]],
        streams: _Streams,
    ) -> None:
        self.runner, self.index, self.blocks, self.streams = runner, index, blocks, streams
        self.output = LayerOutput(runner, index, blocks[-1][1].outgoing)
        self.spaces = Workspaces()

    def learn(self, behind: Tensor) -> None:
        """Learn from the first window, which is its batch's longest, how the layer adds its FFN."""
        batch, hidden = self.streams.batches[0], self.streams.dense[0]
        first = Batch(batch.ids[:1], batch.mask[:1], batch.windows[:1])
        self.output.learn(first, None if hidden is None else hidden[:1], behind[:1])

    def prune(self, position: int, arm: Arm, dense: Sequence[Tensor | None]) -> None:
        """Prune the blocks for one arm, and move its stream behind the layer."""
        streams, stream = self.streams, self.streams.pruned[position]
        numbers = streams.chosen[position]
        probes = self._make_probes(position, arm)
        shortcut = self._can_shortcut(arm, probes, [streams.batches[number] for number in numbers])
        passed: dict[int, Passed] = {}
        for number in numbers:
            aim = None if arm.leafwise else dense[number]
            seen = self._collect(streams.batches[number], stream[number], aim, probes)
            shortcut = shortcut and self.output.can_move(seen)
            if shortcut:
                passed[number] = replace(seen, inner=probes[0].seen)
        tasks = zip(self.blocks, probes, strict=True)
        pathways = [arm.prune(number, probe.task()) for (number, _), probe in tasks]
        arm.blocks.extend(pathways)
        if not shortcut:
            passed.clear()
            with computing([block for _, block in self.blocks], pathways):
                streams.run_pruned(self.runner, self.index, position)
            return
        change = make_change(self.blocks[0][1], pathways[0])
        for number in numbers:
            seen = passed.pop(number)
            assert seen.inner is not None  # or it would not have been kept
            added = change.of(seen.inner.activation, seen.inner.block_input)
            stream[number] = self.output.moved(streams.batches[number], stream[number], seen, added)

    def _make_probes(self, position: int, arm: Arm) -> list[AnyProbe]:
        """Return what will see the blocks; where tokens differ, as it is found now."""
        if not arm.needs_sample:
            return [arm.probe(block, self.spaces) for _, block in self.blocks]
        samples = self._see_sample(position, arm)
        return [
            arm.sampled_probe(block, self.spaces, number, seen)
            for (number, block), seen in zip(self.blocks, samples, strict=True)
        ]

    def _see_sample(self, position: int, arm: Arm) -> list[Seen]:
        """Return what each block computes for some tokens from all over the text."""
        observers = [arm.sampler(block) for _, block in self.blocks]
        parts: list[list[Seen]] = [[] for _ in observers]
        for number in self.streams.sampled(position, arm.sampled_tokens):
            batch = self.streams.batches[number]
            with attached(observers):
                self.runner.run(self.index, batch, self.streams.pruned[position][number])
            rows = batch.mask.flatten().nonzero().flatten()
            for observer, own in zip(observers, parts, strict=True):
                seen = observer.seen_at(rows)
                own.append(seen if arm.samples_neurons else seen.input_alone())
        return [Seen.joined(own) for own in parts]

    def _can_shortcut(self, arm: Arm, probes: Sequence[Observer], batches: Sequence[Batch]) -> bool:
        """Whether the layer's new result follows from its old one without running all of it again.

        So it does where one FFN's output is added as it is, or the rest can be played from a tape,
        and what it takes fits into memory.
        """
        output = self.output
        unlike = arm.samples_neurons or arm.leafwise
        if unlike or len(probes) != 1 or (output.gain is None and output.tape_bytes is None):
            return False
        tokens = sum(batch.ids.numel() for batch in batches)
        seen = 4 * (probes[0].block.d_ff + probes[0].block.d_in) + (output.tape_bytes or 0)
        return tokens * seen <= MOST_KEPT

    def _collect(
        self, batch: Batch, hidden: Tensor | None, aim: Tensor | None, probes: Sequence[AnyProbe]
    ) -> Passed:
        """Add one batch of the pruned stream to the blocks' second moments.

        Args:
            batch: The text.
            hidden: The pruned stream before the layer.
            aim: The dense stream behind it; None where each leaf is pruned for itself.
            probes: Of the layer's blocks.

        Returns:
            The layer's way with its own FFN dense.
        """
        with attached(probes):
            passed = self.output.run(batch, hidden)
        rows = batch.mask.flatten().nonzero().flatten().to(passed.behind.device)
        missing, weights = None, None
        if aim is not None:
            missing, weights = self.output.missing(batch, hidden, passed, aim, rows)
        for probe in probes[:-1]:
            probe.add(rows, None, weights)
        probes[-1].add(rows, missing, weights)
        return passed


def _excerpt(batch: Batch) -> Batch:
    """Return a small batch of a larger one's text, with padding."""
    ids = batch.windows[0].ids
    parts = [Window(ids[:_EXCERPT]), Window(ids[: max(1, len(ids[:_EXCERPT]) // 2)])]
    return next(make_batches(parts, 2))
