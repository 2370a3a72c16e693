"""Other people's ways to skip FFN neurons, as arms on a dense model: the same text, the same FLOPs.

They choose while the model runs, so no pathway can hold them. All are computed densely with masks,
which gives their quality; nothing is said about their speed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.passes import evaluation_mode, run_decoder
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.windows import Batch, Window, make_batches
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.measure.arms import MeasuredArm
from hf_sparse_pathways.measure.fidelity import first_scored

CALIBRATION_WINDOWS = 8
"""Windows of calibration text on which thresholds are set."""

Peer = Callable[[nn.Module, Sequence[Window], float, float], MeasuredArm | None]
"""From model, calibration text, sparsity and context to an arm; None where it does not fit."""


def griffin(
    model: nn.Module,  # noqa: ARG001
    calibration: Sequence[Window],  # noqa: ARG001
    sparsity: float,
    context: float,
) -> MeasuredArm:
    """Return GRIFFIN: per window the neurons that its beginning used most, for what follows.

    Source:
        Dong et al. 2024, arXiv:2404.01365: the prompt is computed densely; of the statistic
        |a_t,i| / |a_t| over its tokens the largest norms stay. ``context`` is the prompt.
    """

    def forward(model: Any, batch: Batch) -> Tensor:
        blocks = find_blocks(model)
        prompts = _prompt_mask(batch, context)
        masks: dict[int, Tensor] = {}

        def choose(index: int, activation: Tensor) -> Tensor:
            share = activation.float() / activation.float().norm(dim=-1, keepdim=True).clamp_min(
                1e-9
            )
            used = (share.square() * prompts.to(share.device).unsqueeze(-1)).sum(1).sqrt()
            kept = max(1, int((1.0 - sparsity) * used.shape[-1] + 1e-6))
            masks[index] = torch.zeros_like(used, dtype=torch.bool)
            masks[index].scatter_(1, used.topk(kept, dim=-1).indices, True)
            return activation

        def apply(index: int, activation: Tensor) -> Tensor:
            kept = masks[index].unsqueeze(1) | prompts.to(activation.device).unsqueeze(-1)
            return activation.masked_fill(~kept, 0)

        with _on_activations(blocks, choose, batch):
            run_decoder(model, batch)
        with _on_activations(blocks, apply, batch):
            return run_model(model, batch)

    return MeasuredArm("griffin", None, 1.0 - sparsity, _dense(forward))


def teal(
    model: nn.Module,
    calibration: Sequence[Window],
    sparsity: float,
    context: float,  # noqa: ARG001
) -> MeasuredArm:
    """Return TEAL-like thresholds: of each FFN matrix's input the smallest entries become zero.

    Source:
        Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models" (TEAL),
        arXiv:2408.14690, FFN matrices only, the same sparsity everywhere.
    """
    blocks = find_blocks(model)
    inputs, activations = _magnitudes(model, calibration, blocks)
    thresholds = [
        tuple(torch.quantile(values, sparsity) for values in pair)
        for pair in zip(inputs, activations, strict=True)
    ]

    def forward(model: Any, batch: Batch) -> Tensor:
        with ExitStack() as stack:
            for block, (low, high) in zip(find_blocks(model), thresholds, strict=True):
                for leaf in block.incoming:
                    stack.callback(leaf.register_forward_pre_hook(_cut(low)).remove)
                stack.callback(block.outgoing.register_forward_pre_hook(_cut(high)).remove)
            return run_model(model, batch)

    return MeasuredArm("teal", None, 1.0 - sparsity, _dense(forward))


def cats(
    model: nn.Module,
    calibration: Sequence[Window],
    sparsity: float,
    context: float,  # noqa: ARG001
) -> MeasuredArm | None:
    """Return CATS-like thresholds: the gate is computed, the rest only where it is large.

    With the gate a third of a gated block's FLOPs, the rest is computed for a share q of neurons
    with ``(1 + 2 q) / 3 = 1 - sparsity``. None for blocks without two incoming leaves, or where
    the gate alone costs more than the budget.

    Source:
        Lee et al. 2024, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language
        Models", arXiv:2404.08763.
    """
    blocks = find_blocks(model)
    share = (3.0 * (1.0 - sparsity) - 1.0) / 2.0
    if any(len(block.layout.incoming) != 2 for block in blocks) or share <= 0.0:
        return None
    gates: list[list[Tensor]] = [[] for _ in blocks]

    def record(index: int, gate: Tensor, activation: Tensor) -> Tensor:
        gates[index].append(_sampled(gate))
        return activation

    batches = list(make_batches(calibration[:CALIBRATION_WINDOWS], 2))
    with torch.no_grad(), all_dense(), evaluation_mode(model), _on_gates(blocks, record):
        for batch in batches:
            run_decoder(model, batch)
    thresholds = [float(torch.quantile(torch.cat(seen), 1.0 - share)) for seen in gates]

    def apply(index: int, gate: Tensor, activation: Tensor) -> Tensor:
        return activation.masked_fill(gate < thresholds[index], 0)

    def forward(model: Any, batch: Batch) -> Tensor:
        with _on_gates(find_blocks(model), apply):
            return run_model(model, batch)

    return MeasuredArm("cats", None, 1.0 - sparsity, _dense(forward))


PEERS: Mapping[str, Peer] = MappingProxyType({"griffin": griffin, "cats": cats, "teal": teal})


def _dense(forward: Callable[[Any, Batch], Tensor]) -> Callable[[Any, Batch], Tensor]:
    """Let every model compute densely while an arm runs."""

    def run(model: Any, batch: Batch) -> Tensor:
        with all_dense():
            return forward(model, batch)

    return run


def _prompt_mask(batch: Batch, context: float) -> Tensor:
    """Return which tokens belong to the windows' beginnings, bool ``(batch, tokens)``."""
    prompts = torch.zeros_like(batch.mask)
    for row, window in enumerate(batch.windows):
        prompts[row, : first_scored(len(window.ids), context)] = True
    return prompts


@contextmanager
def _on_activations(
    blocks: Sequence[FfnBlock], change: Callable[[int, Tensor], Tensor], batch: Batch
) -> Iterator[None]:
    """Within the block, every activation passes through a function as ``(batch, tokens, d_ff)``."""
    shape = batch.ids.shape

    def hook(index: int) -> Any:
        def run(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
            activation = args[0]
            return (change(index, activation.view(*shape, -1)).view_as(activation), *args[1:])

        return run

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.outgoing.register_forward_pre_hook(hook(index)).remove)
        yield


@contextmanager
def _on_gates(
    blocks: Sequence[FfnBlock], change: Callable[[int, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Within the block, activations pass through a function with |act(gate)| = |a / up|."""
    ups: dict[int, Tensor] = {}

    def see_up(index: int) -> Any:
        def run(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
            ups[index] = output

        return run

    def see_activation(index: int) -> Any:
        def run(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
            up = ups.pop(index).float().abs().clamp_min(1e-9)
            gate = args[0].float().abs() / up
            return (change(index, gate, args[0]), *args[1:])

        return run

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.incoming[1].register_forward_hook(see_up(index)).remove)
            pre = block.outgoing.register_forward_pre_hook(see_activation(index))
            stack.callback(pre.remove)
        yield


def _cut(threshold: Tensor) -> Any:
    """Return a pre-hook that zeroes the entries of a leaf's input below a threshold."""

    def run(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
        small = args[0].abs() < threshold.to(args[0].device)
        return (args[0].masked_fill(small, 0), *args[1:])

    return run


def _magnitudes(
    model: nn.Module, calibration: Sequence[Window], blocks: Sequence[FfnBlock]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return samples of |x| and of |a| of every block on calibration text."""
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def record(index: int, what: str) -> Any:
        def run(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
            seen.setdefault((index, what), []).append(_sampled(args[0].float().abs()))

        return run

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(all_dense())
        stack.enter_context(evaluation_mode(model))
        for index, block in enumerate(blocks):
            handle = block.incoming[0].register_forward_pre_hook(record(index, "x"))
            stack.callback(handle.remove)
            handle = block.outgoing.register_forward_pre_hook(record(index, "a"))
            stack.callback(handle.remove)
        for batch in make_batches(calibration[:CALIBRATION_WINDOWS], 2):
            run_decoder(model, batch)
    both = ([torch.cat(seen[index, what]) for index in range(len(blocks))] for what in ("x", "a"))
    return next(both), next(both)


def _sampled(values: Tensor) -> Tensor:
    """Return about a hundred thousand of some values, evenly taken, float32 on the CPU."""
    flat = values.detach().flatten()
    return flat[:: max(1, len(flat) // 100_000)].float().cpu()
