"""One decoder layer at a time over a whole text, with the hidden states between layers kept.

The model's own forward runs, so that positions, masks and whatever else a layer is given are made
by its own code; but the layers before the wanted one return at once what was kept, and the pass
ends behind the wanted one. ``check`` compares that with a plain pass, since a model may hand more
from layer to layer than hidden states. What a layer's modules return before its FFN's output can
be kept on a tape (``tapes.py``), so that with another output only the rest is computed again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.passes import Finished, run_decoder
from hf_sparse_pathways.discovery.tapes import Recorder, Tape, replaced_forwards
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.errors import UnsupportedModelError


class LayerRunner:
    """Runs single decoder layers of a model. Nothing may train or change the model meanwhile.

    Args:
        model: A causal LM in evaluation mode.
        layers: Its decoder layers, in the order in which they run.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model = model
        self.layers = tuple(layers)
        self._results: dict[int, Any] = {}  # what each layer returned once, for its structure

    def run(self, index: int, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Return the hidden states behind a layer, ``(batch, tokens, d_model)``.

        Args:
            index: The layer.
            batch: The text.
            hidden: The hidden states behind the layer before; None for the first layer.
        """
        found: list[Tensor] = []

        def finish(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            if index not in self._results:
                self._results[index] = _without_hidden(output)
            found.append(_hidden_of(output))
            raise Finished

        handle = self.layers[index].register_forward_hook(finish)
        try:
            with self._skipped(index, hidden):
                run_decoder(self.model, batch)
        finally:
            handle.remove()
        if not found:
            raise UnsupportedModelError(f"Decoder layer {index} was not called.")
        return found[0]

    def record(
        self, index: int, batch: Batch, hidden: Tensor | None, leaf: nn.Module
    ) -> tuple[Tensor, Tape | None]:
        """Run a layer and keep what it computes before an FFN's output.

        Args:
            index: The layer.
            batch: The text.
            hidden: As in ``run``.
            leaf: The FFN's outgoing leaf, in the layer.

        Returns:
            The hidden states behind the layer, and the tape; None where ``replay`` could not use
            it.
        """
        with Recorder(self.layers[index], leaf) as recorder:
            behind = self.run(index, batch, hidden)
        return behind, recorder.tape()

    def replay(
        self, index: int, batch: Batch, hidden: Tensor | None, tape: Tape, output: Tensor
    ) -> Tensor:
        """Return the hidden states behind a layer whose FFN had given another output.

        Args:
            index: The layer.
            batch: The text.
            hidden: As in ``run``.
            tape: Of the same layer, batch and hidden states.
            output: In place of ``tape.output``.
        """
        with tape.playing(output):
            return self.run(index, batch, hidden)

    def tape_size(
        self, index: int, batch: Batch, hidden: Tensor | None, leaf: nn.Module
    ) -> int | None:
        """Return the bytes of a layer's tape; None where a replay is not what the layer does."""
        behind, tape = self.record(index, batch, hidden, leaf)
        if tape is None:
            return None
        unchanged = self.replay(index, batch, hidden, tape, tape.output)
        return tape.size if torch.equal(unchanged, behind) else None

    def check(self, batch: Batch) -> None:
        """Check that layers run one at a time compute what they do in a plain pass.

        Raises:
            UnsupportedModelError: They do not.
        """
        seen: dict[int, Tensor] = {}

        def remember(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
                seen[index] = _hidden_of(output).detach().clone()

            return hook

        handles = [
            layer.register_forward_hook(remember(index)) for index, layer in enumerate(self.layers)
        ]
        try:
            run_decoder(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        real = batch.mask.unsqueeze(-1)
        hidden = None
        for index in range(len(self.layers)):
            try:
                hidden = self.run(index, batch, hidden)
            except (TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
                raise UnsupportedModelError(
                    f"Decoder layer {index} alone fails: {error}"
                ) from error
            expected = seen.get(index)
            if expected is None or expected.shape != hidden.shape:
                raise UnsupportedModelError(f"Decoder layer {index} is not called once per pass.")
            mask = real.to(hidden.device)
            difference = ((hidden - expected) * mask).float().norm()
            if not difference <= 1e-2 * (expected * mask).float().norm():
                raise UnsupportedModelError(
                    f"Decoder layer {index} computes something else alone than in the whole model."
                )

    @contextmanager
    def _skipped(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Within the block, the layers before one return at once; the last of them ``hidden``."""
        stubs = {
            layer: _Stub(self._results[position], hidden)
            for position, layer in enumerate(self.layers[:index])
        }
        with replaced_forwards(stubs):
            yield


def stacked_layers(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return every layer of the stacks that hold given layers, those without an FFN included."""
    wanted = set(map(id, layers))
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and any(id(child) in wanted for child in module)
    ]
    return list(dict.fromkeys(layer for stack in stacks for layer in stack))


class _Stub:
    """Stands in for a layer's forward and returns kept hidden states in the layer's structure."""

    def __init__(self, structure: Any, hidden: Tensor | None) -> None:
        self.structure, self.hidden = structure, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        if self.structure is None:
            return self.hidden
        return (self.hidden, *self.structure)


def _hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a layer returned."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(f"A decoder layer returned {type(hidden).__name__}.")
    return hidden


def _without_hidden(output: Any) -> tuple[Any, ...] | None:
    """Return the shape of a layer's result; None if it returned hidden states alone.

    Other tensors (attention weights) belong to one batch and are left out.
    """
    if not isinstance(output, tuple):
        return None
    return tuple(None if isinstance(part, Tensor) else part for part in output[1:])
