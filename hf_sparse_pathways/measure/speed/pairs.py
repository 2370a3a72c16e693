"""Dense and sparse ``generate`` in turn: one ratio per domain, with nothing else around it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.runs import generate, random_ids
from hf_sparse_pathways.measure.speed.timing import alternate
from hf_sparse_pathways.measure.speed.workloads import Workload
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.shares import format_share


@dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """Dense and sparse generation, timed alternately in one process.

    Attributes:
        domain: The pathway that ran.
        executor: How its neurons were computed.
        sparsity: Fraction of neurons removed.
        dense: Tokens per second of the dense arm, one per round.
        sparse: Tokens per second of the sparse arm, one per round.
    """

    domain: str
    executor: str
    sparsity: float
    dense: tuple[float, ...]
    sparse: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Sparse over dense, round by round."""
        return [sparse / dense for sparse, dense in zip(self.sparse, self.dense, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, medians and quartiles included."""
        return {
            **asdict(self),
            "dense_median": quantile(self.dense, 0.5),
            "sparse_median": quantile(self.sparse, 0.5),
            "ratio_median": quantile(self.ratios, 0.5),
            "ratio_quartiles": [quantile(self.ratios, 0.25), quantile(self.ratios, 0.75)],
        }

    def __str__(self) -> str:
        low, middle, high = (quantile(self.ratios, q) for q in (0.25, 0.5, 0.75))
        return (
            f"{self.domain}: dense {quantile(self.dense, 0.5):.1f} tokens/s, sparse "
            f"{quantile(self.sparse, 0.5):.1f} tokens/s ({self.executor}, sparsity "
            f"{format_share(self.sparsity)}); ratio {middle:.2f} (quartiles {low:.2f} to "
            f"{high:.2f}, {len(self.dense)} rounds)"
        )


def time_generation(
    model: SparsePathwaysForCausalLM,
    domains: Sequence[str] = (),
    *,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    rounds: int = 7,
) -> list[GenerationSpeed]:
    """Time whole calls of greedy ``generate`` at batch 1, prompt included, as the model is set.

    Args:
        model: A model with pathways; it is left as it was.
        domains: Which to time; all of them if empty.
        prompt_tokens: Length of the prompt, random token ids.
        new_tokens: Tokens that each call generates.
        rounds: Timed rounds per domain, after one round of warming up.

    Raises:
        UnknownNameError: An unknown domain.
        PathwaysError: A number is not positive.
    """
    if min(prompt_tokens, new_tokens, rounds) < 1:
        raise PathwaysError(
            "prompt_tokens, new_tokens and rounds have to be positive: "
            f"{prompt_tokens}, {new_tokens}, {rounds}."
        )
    ids = random_ids(model, Workload(kind="decode", tokens=prompt_tokens))

    def arm(domain: str | None) -> Callable[[], float]:
        def run() -> float:
            started = clock.now(model.device)
            generate(model, ids, new_tokens, domain=domain)
            return new_tokens / (clock.now(model.device) - started)

        return run

    executor = model.execution.executor
    speeds = []
    for name in model.pathways.subset(domains or model.domains).domains:
        rates = alternate({"dense": arm(None), "sparse": arm(name)}, rounds, f"time {name}")
        sparsity = model.pathways.sparsity(name)
        speeds.append(GenerationSpeed(domain=name, executor=executor, sparsity=sparsity, **rates))
    return speeds
