"""Block after block: each is pruned and repaired on what the pruned blocks before it really give.

Two streams of hidden states run over the calibration text, the dense model's and the pruned one's,
one decoder layer at a time. At a layer, with its own FFN still dense, the pruned stream gives the
activation a and input x; the difference of the two streams behind the layer, e, is what earlier
layers have left wrong. The block is then pruned and repaired towards ``y* = W a + e``, so that it
also undoes what it can of their error, and the pruned stream moves on through the repaired block.

Where the layer adds the FFN's output to the residual stream as it is, e is taken as it is. Where a
norm comes between, e is divided by the norm's gain, which is measured by a small change of the
output, and tokens are weighted by its square, since that is how their errors arrive.

Source: sequential least squares on the pruned model's own inputs as in Frantar & Alistarh 2023,
"SparseGPT", arXiv:2301.00774; the target in the residual stream is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.clustering import (
    SAMPLE,
    ClusteredTask,
    Clustering,
    ClusterProbe,
)
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grouping import Grouped, GroupedProbe
from hf_sparse_pathways.discovery.layerwise import LayerRunner
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.probes import (
    Change,
    ClusteredChange,
    Observer,
    Probe,
    Seen,
    attached,
    make_change,
)
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.discovery.skipping import FEWEST, SkippingProbe
from hf_sparse_pathways.discovery.skipping import SAMPLE as SKIPPING_SAMPLE
from hf_sparse_pathways.discovery.tapes import Tape
from hf_sparse_pathways.discovery.trials import computing
from hf_sparse_pathways.discovery.windows import Batch, Window, make_batches
from hf_sparse_pathways.ffn.additions import needed_input
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.ffn.clusters import Kept

PruneBlock = Callable[[int, BlockTask | ClusteredTask], Kept]
"""From a block's number and its task to its pathway."""

AnyProbe = Probe | ClusterProbe | SkippingProbe | GroupedProbe

FindThreshold = Callable[[int, Seen], Tensor]
"""From a block's number and what it computes for some tokens to the thresholds of its gates."""

FindGroups = Callable[[int, Seen], Grouped | None]
"""The same to the groups of its neurons, if there is room for some."""

_PROBE = 0.1
"""Size of the change by which a norm's gain is measured, relative to the output."""

MOST_KEPT = 2 * 10**9
"""Most bytes of activations that are kept to spare a layer's second run."""

_EXCERPT = 64
"""Tokens of text on which it is checked that layers can be run one at a time."""

_LEAST_GAIN = 0.1
"""Channels whose gain is below this share of the token's are hardly corrected."""


@dataclass
class Arm:
    """One pathway in the making.

    Attributes:
        name: What it is called.
        batches: Its calibration text; arms that hold the same batch share its dense pass.
        prune: Chooses and repairs each block.
        inputs: Whether a bypass needs the blocks' inputs.
        clustering: How each block's tokens are clustered; None where all have the same neurons.
        threshold: Finds what gates have to exceed; None where no token skips a neuron.
        groups: Finds the groups of neurons; None where every token has all that are kept.
        leafwise: Whether every leaf is pruned towards its own output, as in SparseGPT: the dense
            stream is not needed, and the activation changes.
        blocks: The pathways of the blocks that are done.
    """

    name: str
    batches: Sequence[Batch]
    prune: PruneBlock
    inputs: bool = True
    clustering: Clustering | None = None
    threshold: FindThreshold | None = None
    groups: FindGroups | None = None
    leafwise: bool = False
    blocks: list[Kept] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check that leaves that are pruned by themselves have all tokens."""
        assert not (self.leafwise and (self.threshold or self.groups))


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
    layers = list(dict.fromkeys(block.layer for block in blocks))
    leafwise = all(arm.leafwise for arm in arms)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(all_dense())
        stack.enter_context(evaluation_mode(model))
        runner = LayerRunner(model, _all_layers(model, layers))
        runner.check(_excerpt(streams.batches[0]))
        for index, layer in enumerate(
            tqdm(runner.layers, desc="prune", unit="layer", disable=None)
        ):
            own = [(number, block) for number, block in enumerate(blocks) if block.layer is layer]
            step = _Layer(runner, index, own)
            dense = streams.dense if leafwise else step.run_dense(streams)
            for position, arm in enumerate(arms):
                step.prune(streams, position, arm, dense)
            streams.dense = list(dense)
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


class _Layer:
    """One decoder layer and its FFN blocks (nearly always one)."""

    def __init__(
        self, runner: LayerRunner, index: int, blocks: Sequence[tuple[int, FfnBlock]]
    ) -> None:
        self.runner, self.index, self.blocks = runner, index, blocks
        self.spaces = Workspaces()
        self.gain: float | None = None  # of the FFN's output in the layer's; None if it varies
        self.tape_bytes: int | None = None  # per token, where such a layer can be played from tape

    def run_dense(self, streams: _Streams) -> list[Tensor]:
        """Return the dense stream behind the layer, and learn how the layer adds its FFN."""
        behind: list[Tensor] = []
        for batch, hidden in zip(streams.batches, streams.dense, strict=True):
            behind.append(self.runner.run(self.index, batch, hidden))
        if self.blocks:
            batch, hidden = _first_row(streams.batches[0]), streams.dense[0]
            hidden = None if hidden is None else hidden[:1]
            self.gain = self._constant_gain(batch, hidden, behind[0][:1])
            if self.gain is None:
                size = self.runner.tape_size(self.index, batch, hidden, self._leaf)
                self.tape_bytes = None if size is None else -(-size // batch.ids.numel())
        return behind

    @property
    def _leaf(self) -> nn.Module:
        """The outgoing leaf of the layer's last FFN."""
        return self.blocks[-1][1].outgoing

    def prune(
        self, streams: _Streams, position: int, arm: Arm, dense: Sequence[Tensor | None]
    ) -> None:
        """Prune this layer's blocks for one arm, and move its stream behind the layer."""
        stream, numbers = streams.pruned[position], streams.chosen[position]
        probes = self._make_probes(streams, position, arm)
        batches = [streams.batches[number] for number in numbers]
        shortcut = arm.threshold is None and arm.groups is None and not arm.leafwise
        shortcut = shortcut and self._can_shortcut(probes, batches)
        kept: dict[int, _Passed] = {}
        if probes:
            for number in numbers:
                batch = streams.batches[number]
                aim = None if arm.leafwise else dense[number]
                behind, tape = self._collect(batch, stream[number], aim, probes)
                if shortcut:
                    kept[number] = _Passed(behind, tape, probes[0].seen)
        if self.gain is None:
            shortcut = shortcut and all(seen.tape is not None for seen in kept.values())
        tasks = zip(self.blocks, probes, strict=True)
        pathways = [arm.prune(number, probe.task()) for (number, _), probe in tasks]
        arm.blocks.extend(pathways)
        if shortcut:
            change = make_change(self.blocks[0][1], pathways[0])
            for number in numbers:
                batch, seen = streams.batches[number], kept.pop(number)
                stream[number] = self._moved(batch, stream[number], seen, change)
            return
        with computing([block for _, block in self.blocks], pathways):
            for number in numbers:
                hidden = stream[number]
                stream[number] = self.runner.run(self.index, streams.batches[number], hidden)

    def _make_probes(self, streams: _Streams, position: int, arm: Arm) -> list[AnyProbe]:
        """Return what will see the blocks; where tokens differ, as it is found now."""
        if arm.threshold is None and arm.clustering is None and arm.groups is None:
            return [
                Probe(block, self.spaces, inputs=arm.inputs, leafwise=arm.leafwise)
                for _, block in self.blocks
            ]
        samples = self._see_sample(streams, position, arm)
        return [
            self._make_probe(arm, number, block, seen)
            for (number, block), seen in zip(self.blocks, samples, strict=True)
        ]

    def _make_probe(self, arm: Arm, number: int, block: FfnBlock, seen: Seen) -> AnyProbe:
        """Return what will see a block that does not compute the same for all tokens."""
        find, spaces, inputs = arm.threshold, self.spaces, arm.inputs
        if arm.groups is not None:
            grouped = arm.groups(number, seen)
            if grouped is None:
                return Probe(block, spaces, inputs=inputs)
            return GroupedProbe(block, spaces, grouped, inputs=inputs)
        if arm.clustering is None:
            assert find is not None  # or tokens do not differ
            return SkippingProbe(block, spaces, find(number, seen), inputs=inputs)
        router = arm.clustering.fit(needed_input(seen.block_input).float())
        thresholds: list[Tensor] = []
        if find is not None:
            clusters = router(needed_input(seen.block_input))
            for cluster in range(len(router.bias)):
                own = (clusters == cluster).nonzero().flatten()
                few = len(own) < FEWEST
                thresholds.append(find(number, seen if few else seen.at(own)))
        return ClusterProbe(
            block,
            spaces,
            router,
            arm.clustering.prior,
            inputs=inputs,
            thresholds=thresholds,
            leafwise=arm.leafwise,
        )

    def _see_sample(self, streams: _Streams, position: int, arm: Arm) -> list[Seen]:
        """Return what each block computes for some tokens from all over the text."""
        skips = arm.threshold is not None
        observers = [Observer(block, inputs=True, ups=skips) for _, block in self.blocks]
        parts: list[list[Seen]] = [[] for _ in observers]
        wanted = SKIPPING_SAMPLE if skips and arm.clustering is None else SAMPLE
        for number in _sample(streams, streams.chosen[position], wanted):
            batch = streams.batches[number]
            with attached(observers):
                self.runner.run(self.index, batch, streams.pruned[position][number])
            rows = batch.mask.flatten().nonzero().flatten()
            for observer, own in zip(observers, parts, strict=True):
                seen = observer.seen_at(rows)
                own.append(seen if skips or arm.groups is not None else seen.input_alone())
        return [Seen.joined(own) for own in parts]

    def _moved(
        self,
        batch: Batch,
        hidden: Tensor | None,
        seen: "_Passed",
        change: "Change | ClusteredChange",
    ) -> Tensor:
        """Return the hidden states behind the layer with its FFN pruned."""
        added = change.of(seen.inner.activation, seen.inner.block_input)
        if self.gain is not None:
            gained = added * self.gain
            return seen.behind + gained.view_as(seen.behind).to(seen.behind.dtype)
        assert seen.tape is not None  # or the layer would be run in full
        dense = seen.tape.output
        output = dense + added.view_as(dense).to(dense.dtype)
        return self.runner.replay(self.index, batch, hidden, seen.tape, output)

    def _can_shortcut(self, probes: Sequence[Observer], batches: Sequence[Batch]) -> bool:
        """Whether the layer's new result follows from its old one without running all of it again.

        So it does where one FFN's output is added as it is, or the rest can be played from a tape,
        and what it takes fits into memory.
        """
        if len(probes) != 1 or (self.gain is None and self.tape_bytes is None):
            return False
        tokens = sum(batch.ids.numel() for batch in batches)
        seen = 4 * (probes[0].block.d_ff + probes[0].block.d_in) + (self.tape_bytes or 0)
        return tokens * seen <= MOST_KEPT

    def _collect(
        self,
        batch: Batch,
        hidden: Tensor | None,
        dense: Tensor | None,
        probes: list[AnyProbe],
    ) -> tuple[Tensor, Tape | None]:
        """Add one batch of the pruned stream to the blocks' second moments.

        Args:
            batch: The text.
            hidden: The pruned stream before the layer.
            dense: The dense stream behind it; None where each leaf is pruned for itself.
            probes: Of the layer's blocks.

        Returns:
            The hidden states behind the layer with its own FFN dense, and the layer's tape if it
            is needed for another output.
        """
        with attached(probes):
            if self.tape_bytes is not None and dense is not None:
                behind, tape = self.runner.record(self.index, batch, hidden, self._leaf)
            else:
                behind, tape = self.runner.run(self.index, batch, hidden), None
        rows = batch.mask.flatten().nonzero().flatten().to(behind.device)
        if dense is None:
            for probe in probes:
                probe.add(rows, None, None)
            return behind, None
        missing = (dense - behind).flatten(0, -2).index_select(0, rows).float()
        weights = None
        if self.gain is not None:
            missing /= self.gain
        else:
            gain = self._gain(batch, hidden, behind, tape).index_select(0, rows)
            weights = gain.square().mean(1, keepdim=True).sqrt()
            missing *= gain / (gain.square() + (_LEAST_GAIN * weights).square())
        for probe in probes[:-1]:
            probe.add(rows, None, weights)
        probes[-1].add(rows, missing, weights)
        return behind, tape

    def _constant_gain(self, batch: Batch, hidden: Tensor | None, behind: Tensor) -> float | None:
        """Return the factor with which the last FFN's output enters the layer's; None if it varies.

        The output is changed at random, by as much as the layer's own result. What is left of the
        factor are the digits that do not depend on the text.
        """
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(behind.shape, generator=generator).to(behind)
        noise *= behind.float().square().mean().sqrt()
        change = (self._changed(batch, hidden, lambda _: noise) - behind).float()
        noise = noise.float()
        factor = float((change * noise).sum() / noise.square().sum())
        rest = float((change - factor * noise).norm() / change.norm().clamp_min(1e-30))
        return float(f"{factor:.4g}") if rest < 0.05 and factor > 0 else None

    def _gain(
        self, batch: Batch, hidden: Tensor | None, behind: Tensor, tape: Tape | None
    ) -> Tensor:
        """Return d(layer) / d(output) of every token and channel, ``(tokens, d_model)``."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, behind.shape, generator=generator).to(behind) * 2 - 1
        size: list[Tensor] = []

        def change(output: Tensor) -> Tensor:
            size.append(_PROBE * output.float().square().mean(-1, keepdim=True).sqrt())
            return (signs.view_as(output) * size[-1]).to(output.dtype)

        changed = self._changed(batch, hidden, change, tape)
        step = size[0].reshape(-1, 1).float()
        return ((changed - behind) * signs).flatten(0, -2).float() / step.clamp_min(1e-12)

    def _changed(
        self,
        batch: Batch,
        hidden: Tensor | None,
        change: Callable[[Tensor], Tensor],
        tape: Tape | None = None,
    ) -> Tensor:
        """Return the layer's result when something is added to its last FFN's output."""

        def add(output: Tensor) -> Tensor:
            return output + change(output).view_as(output).to(output.dtype)

        if tape is not None:
            return self.runner.replay(self.index, batch, hidden, tape, add(tape.output))
        handle = self._leaf.register_forward_hook(lambda _module, _args, output: add(output))
        try:
            return self.runner.run(self.index, batch, hidden)
        finally:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Passed:
    """One batch's way through a layer whose FFN was dense."""

    behind: Tensor
    tape: Tape | None
    inner: Seen


def _sample(streams: _Streams, numbers: Sequence[int], wanted: int) -> Sequence[int]:
    """Return batches from all over a text, with about as many tokens as are wanted, or more."""
    tokens = sum(int(streams.batches[number].mask.sum()) for number in numbers)
    return numbers[:: max(1, tokens // wanted)]


def _first_row(batch: Batch) -> Batch:
    """Return a batch's first window, which is its longest, alone."""
    return Batch(batch.ids[:1], batch.mask[:1], batch.windows[:1])


def _excerpt(batch: Batch) -> Batch:
    """Return a small batch of a larger one's text, with padding."""
    ids = batch.windows[0].ids
    parts = [Window(ids[:_EXCERPT]), Window(ids[: max(1, len(ids[:_EXCERPT]) // 2)])]
    return next(make_batches(parts, 2))


def _all_layers(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return every layer of the stacks that hold given layers, those without an FFN included."""
    wanted = set(map(id, layers))
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and any(id(child) in wanted for child in module)
    ]
    return list(dict.fromkeys(layer for stack in stacks for layer in stack))
