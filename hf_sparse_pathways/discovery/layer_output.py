"""How a decoder layer adds its last FFN's output to the stream, and what another output would give.

Where the layer adds the FFN's output to the residual stream as it is, an error behind the layer is
one of the output. Where a norm comes between, the error is divided by the norm's gain, which is
measured by a small change of the output, and tokens are weighted by its square, since that is how
their errors arrive.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.layerwise import LayerRunner
from hf_sparse_pathways.discovery.probes import Seen
from hf_sparse_pathways.discovery.tapes import Tape
from hf_sparse_pathways.discovery.windows import Batch

_PROBE = 0.1
"""Size of the change by which a norm's gain is measured, relative to the output."""

_LEAST_GAIN = 0.1
"""Channels whose gain is below this share of the token's are hardly corrected."""


@dataclass(frozen=True, eq=False)
class Passed:
    """One batch's way through a layer whose FFN was dense.

    Attributes:
        behind: The hidden states behind the layer, ``(batch, tokens, d_model)``.
        tape: What the layer computed before the FFN's output, where it was kept.
        inner: What the FFN computed, where it was kept.
    """

    behind: Tensor
    tape: Tape | None
    inner: Seen | None = None


class LayerOutput:
    """One decoder layer as a function of its last FFN's output.

    Args:
        runner: Runs the layer.
        index: The layer.
        leaf: The outgoing leaf of its last FFN.

    Attributes:
        gain: With which the output enters the layer's result; None if it varies, or is not known.
        tape_bytes: Of a tape, per token, where a layer whose gain varies can be played from one.
    """

    def __init__(self, runner: LayerRunner, index: int, leaf: nn.Module) -> None:
        self.runner, self.index, self.leaf = runner, index, leaf
        self.gain: float | None = None
        self.tape_bytes: int | None = None

    def learn(self, batch: Batch, hidden: Tensor | None, behind: Tensor) -> None:
        """Find the gain, and what a tape takes where there is none.

        Args:
            batch: Some text.
            hidden: The hidden states before the layer; None for the first layer.
            behind: Those behind it.
        """
        self.gain = self._constant_gain(batch, hidden, behind)
        if self.gain is None:
            size = self.runner.tape_size(self.index, batch, hidden, self.leaf)
            self.tape_bytes = None if size is None else -(-size // batch.ids.numel())

    def run(self, batch: Batch, hidden: Tensor | None) -> Passed:
        """Run the layer as it is, with a tape where other outputs need it."""
        if self.tape_bytes is None:
            return Passed(self.runner.run(self.index, batch, hidden), None)
        return Passed(*self.runner.record(self.index, batch, hidden, self.leaf))

    def can_move(self, passed: Passed) -> bool:
        """Whether ``moved`` can tell what another output would give."""
        return self.gain is not None or passed.tape is not None

    def missing(
        self, batch: Batch, hidden: Tensor | None, passed: Passed, aim: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the output lacks for the layer to give what it should.

        Args:
            batch: The text.
            hidden: The hidden states before the layer.
            passed: What the layer gave.
            aim: What it should have given.
            rows: Which tokens, of all of the batch.

        Returns:
            The errors of the output, ``(rows, d_model)``, and the tokens' weights, ``(rows, 1)``;
            None where they are equal.
        """
        missing = (aim - passed.behind).flatten(0, -2).index_select(0, rows).float()
        if self.gain is not None:
            missing /= self.gain
            return missing, None
        gain = self.token_gains(batch, hidden, passed).index_select(0, rows)
        weights = gain.square().mean(1, keepdim=True).sqrt()
        missing *= gain / (gain.square() + (_LEAST_GAIN * weights).square())
        return missing, weights

    def moved(self, batch: Batch, hidden: Tensor | None, passed: Passed, added: Tensor) -> Tensor:
        """Return the hidden states behind the layer when something is added to the output.

        Args:
            batch: The text.
            hidden: The hidden states before the layer.
            passed: What the layer gave, with a tape where the gain varies.
            added: To the output, ``(tokens of the batch, d_model)``.
        """
        if self.gain is not None:
            gained = added * self.gain
            return passed.behind + gained.view_as(passed.behind).to(passed.behind.dtype)
        assert passed.tape is not None  # or the layer would be run in full
        return self._replayed(batch, hidden, passed.tape, added)

    def _constant_gain(self, batch: Batch, hidden: Tensor | None, behind: Tensor) -> float | None:
        """Return the factor with which the output enters the layer's result; None if it varies.

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

    def token_gains(self, batch: Batch, hidden: Tensor | None, passed: Passed) -> Tensor:
        """Return d(layer) / d(output) of every token and channel, ``(tokens, d_model)``."""
        behind = passed.behind
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, behind.shape, generator=generator).to(behind) * 2 - 1
        size: list[Tensor] = []

        def change(output: Tensor) -> Tensor:
            size.append(_PROBE * output.float().square().mean(-1, keepdim=True).sqrt())
            return (signs.view_as(output) * size[-1]).to(output.dtype)

        if passed.tape is None:
            changed = self._changed(batch, hidden, change)
        else:
            changed = self._replayed(batch, hidden, passed.tape, change(passed.tape.output))
        step = size[0].reshape(-1, 1).float()
        return ((changed - behind) * signs).flatten(0, -2).float() / step.clamp_min(1e-12)

    def _replayed(self, batch: Batch, hidden: Tensor | None, tape: Tape, added: Tensor) -> Tensor:
        """Return the layer's result with something added to the output that is on a tape."""
        output = tape.output + added.view_as(tape.output).to(tape.output.dtype)
        return self.runner.replay(self.index, batch, hidden, tape, output)

    def _changed(
        self, batch: Batch, hidden: Tensor | None, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the layer's result, run in full, with something added to the output."""

        def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            return output + change(output).view_as(output).to(output.dtype)

        handle = self.leaf.register_forward_hook(add)
        try:
            return self.runner.run(self.index, batch, hidden)
        finally:
            handle.remove()
