"""Which experts of sgatlin layers a domain's text uses, and models restricted to them.

For each expert of each layer two figures are gathered over a domain's tokens: how often it is
chosen, and the mean norm of what it adds, ``|s <u, x>| ||v||`` (0 where it is not chosen). A
domain's *experts* are a share of each channel, those that add most: its pathway through the layers,
as neurons are in a dense FFN.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.passes import evaluation_mode, run_decoder
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import (
    Batch,
    draw_windows,
    list_digests,
    make_batches,
    resolve_length,
)
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.measure.overlap import PairOverlap, compare_neurons
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN
from hf_sparse_pathways.sgatlin.restriction import ExpertSets, restrict

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.text import TextSource

SPECIALISED = 2.0
"""An expert is specialised if some domain chooses it more than so many times the mean."""


@dataclass(frozen=True, kw_only=True)
class LayerUsage:
    """What one domain's tokens did in one layer.

    Attributes:
        chosen: Share of the tokens that chose an expert, float64 ``(n_channels, n_experts)``.
        added: Mean norm over all tokens of what it added, of the same shape.
    """

    chosen: Tensor
    added: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertUsage:
    """What the domains' tokens did in all layers.

    Attributes:
        by_domain: Domain -> one entry per layer.
        tokens: Domain -> how many tokens were read.
        top_k: Experts that a token gets of each channel.
        seen: Domain -> digests of the documents that were read, and of those cut for that.
    """

    by_domain: Mapping[str, tuple[LayerUsage, ...]]
    tokens: Mapping[str, int]
    top_k: int
    seen: Mapping[str, tuple[Sequence[str], Sequence[str]]]

    def utilisation(self, domain: str) -> tuple[float, ...]:
        """Return the share of each layer's experts that a domain has chosen at all."""
        return tuple(float((own.chosen > 0).double().mean()) for own in self._of(domain))

    def specialisation(self) -> tuple[float, ...]:
        """Return the share of each layer's used experts that are specialised.

        Of how often the domains choose an expert, the highest over the mean is compared with
        ``SPECIALISED``, as it is for activations of neurons.

        Raises:
            PathwaysError: There is one domain only.
        """
        if len(self.by_domain) < 2:
            raise PathwaysError("Specialisation compares domains; give the text of at least two.")
        shares = []
        for layer in zip(*self.by_domain.values(), strict=True):
            chosen = torch.stack([own.chosen for own in layer])
            used = chosen.sum(0) > 0
            ratios = chosen.amax(0)[used] / chosen.mean(0)[used]
            shares.append(float((ratios > SPECIALISED).double().mean()))
        return tuple(shares)

    def experts(self, domain: str, share: float) -> tuple[Tensor, ...]:
        """Return a domain's experts: of each channel the share that adds most, ``top_k`` at least.

        Args:
            domain: The domain.
            share: From 0 to 1.

        Returns:
            One bool tensor ``(n_channels, n_experts)`` per layer.
        """
        return tuple(self._best(own.added, share) for own in self._of(domain))

    def pooled(self, share: float) -> tuple[Tensor, ...]:
        """Return the experts that add most over all domains, each domain counting alike."""
        layers = zip(*self.by_domain.values(), strict=True)
        return tuple(self._best(sum(own.added for own in layer), share) for layer in layers)

    def random(self, share: float, seed: int = 0) -> tuple[Tensor, ...]:
        """Return as many experts of each channel, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        first = next(iter(self.by_domain.values()))
        drawn = [torch.rand(own.added.shape, generator=generator) for own in first]
        return tuple(self._best(values, share) for values in drawn)

    def overlaps(self, share: float) -> tuple[PairOverlap, ...]:
        """Return how alike the domains' experts are, beside chance."""
        flat = {d: [own.flatten() for own in self.experts(d, share)] for d in self.by_domain}
        return tuple(compare_neurons(a, b, flat[a], flat[b]) for a, b in combinations(flat, 2))

    def _best(self, values: Any, share: float) -> Tensor:
        if not 0.0 < share <= 1.0:
            raise PathwaysError(f"share has to be above 0 and at most 1, got {share!r}.")
        count = max(self.top_k, round(share * values.shape[1]))
        best = values.topk(count, dim=1).indices
        return torch.zeros(values.shape, dtype=torch.bool).scatter(1, best, value=True)

    def _of(self, domain: str) -> tuple[LayerUsage, ...]:
        if domain not in self.by_domain:
            raise UnknownNameError("domain", domain, self.by_domain)
        return self.by_domain[domain]


def measure_experts(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    texts: "Mapping[str, TextSource]",
    *,
    max_tokens: int = 16_384,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> ExpertUsage:
    """Count what domains' tokens choose in a model's sgatlin layers.

    Args:
        model: A model with such layers.
        tokenizer: Its tokenizer.
        texts: Domain -> text, as ``sp.profile`` takes it.
        max_tokens: Most tokens of a domain.
        max_length: Most tokens of a window.
        batch_size: Windows of a pass.
        seed: Decides what is drawn.

    Raises:
        UnsupportedModelError: The model has no such layers.
        PathwaysError: No text was given.
    """
    layers = sgatlin_layers(model)
    if not texts:
        raise PathwaysError("No domains were given. Pass a dictionary {domain: text source}.")
    length = resolve_length(model, max_length)
    by_domain, tokens, seen = {}, {}, {}
    for domain, source in texts.items():
        documents = read_documents(source, seed=seed, tokens=max_tokens)
        windows = draw_windows(
            documents, tokenizer, max_tokens=max_tokens, max_length=length, seed=seed
        )
        tally = _Tally(layers)
        with evaluation_mode(model), torch.no_grad():
            for batch in make_batches(windows, batch_size):
                tally.read(model, batch)
        by_domain[domain], tokens[domain] = tally.usage(), tally.tokens
        seen[domain] = list_digests(windows)
    top_k = layers[0].config.top_k
    return ExpertUsage(by_domain=by_domain, tokens=tokens, top_k=top_k, seen=seen)


@contextmanager
def restrict_experts(model: Any, sets: ExpertSets) -> Iterator[Any]:
    """Within the block, on this thread, a model's tokens get the best of allowed experts only.

    Args:
        model: A model with sgatlin layers; it generates and computes as ever, without gradients.
        sets: Of each layer, such as ``usage.experts("code", 0.5)``.

    Raises:
        UnsupportedModelError: The model has no such layers.
        MismatchError: The sets are of another model's shape.
        PathwaysError: Fewer experts of a channel are allowed than a token gets.
    """
    with restrict(sgatlin_layers(model), sets):
        yield model


def sgatlin_layers(model: Any) -> Sequence[SgatlinFFN]:
    """Return a model's sgatlin layers, in its order.

    Raises:
        UnsupportedModelError: It has none.
    """
    layers = [module for module in model.modules() if isinstance(module, SgatlinFFN)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no sgatlin layers. Build it with SparsePathwaysConfig."
            "from_base(config, ffn=sp.SgatlinConfig(...))."
        )
    return layers


class _Tally:
    """Sums over one domain's tokens, float64."""

    def __init__(self, layers: Sequence[SgatlinFFN]) -> None:
        self.layers, self.tokens = layers, 0
        self.chosen = [torch.zeros(layer.u.shape[:2], dtype=torch.float64) for layer in layers]
        self.added = [torch.zeros_like(own) for own in self.chosen]

    def read(self, model: Any, batch: Batch) -> None:
        """Add a batch; padding is left out."""
        self.tokens += int(batch.mask.sum())
        inputs: dict[int, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args: inputs.__setitem__(id(module), args[0])
            )
            for layer in self.layers
        ]
        try:
            run_decoder(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        for index, layer in enumerate(self.layers):
            x = inputs[id(layer)].reshape(-1, layer.d_model)
            self._add(index, layer, x[batch.mask.flatten().to(x.device)])

    def _add(self, index: int, layer: SgatlinFFN, x: Tensor) -> None:
        scores, chosen = layer.route(x)
        for channel in range(layer.config.n_channels):
            place = chosen[:, channel]
            rows = layer.u[channel][place]
            gated = scores[:, channel] * torch.einsum("tkd,td->tk", rows, x.to(rows.dtype))
            added = gated.abs().double() * layer.v[channel].double().norm(dim=1)[place]
            flat = place.flatten().cpu()
            ones = torch.ones(len(flat), dtype=torch.float64)
            self.chosen[index][channel].index_add_(0, flat, ones)
            self.added[index][channel].index_add_(0, flat, added.flatten().cpu())

    def usage(self) -> tuple[LayerUsage, ...]:
        """Return the means."""
        pairs = zip(self.chosen, self.added, strict=True)
        return tuple(LayerUsage(chosen=c / self.tokens, added=a / self.tokens) for c, a in pairs)
