"""What the paper states, to stand beside what is seen.

Source: A. Young 2026, "Sparse Pathways". Parameter counts are those of the models' cards.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One model of the paper's table.

    Attributes:
        name: As the paper calls it.
        parameters: Number of parameters.
        specialised: Fraction of neurons with a ratio above 2.
    """

    name: str
    parameters: float
    specialised: float


MODELS = (
    PublishedModel(name="TinyLlama", parameters=1.10e9, specialised=0.074),
    PublishedModel(name="Qwen1.5-1.8B", parameters=1.84e9, specialised=0.476),
    PublishedModel(name="gemma-2b", parameters=2.51e9, specialised=0.518),
    PublishedModel(name="phi-2", parameters=2.78e9, specialised=0.309),
    PublishedModel(name="Phi-3.5-mini", parameters=3.82e9, specialised=0.302),
    PublishedModel(name="K2-Think-32B", parameters=32.8e9, specialised=0.682),
)

FIRST_BLOCK_SKIPPABLE = {"math": 0.904, "code": 0.729, "factual": 0.521, "language": 0.483}
"""Of Phi-3.5-mini, by domain."""

PRESERVED_COSINE = 0.999
"""Least cosine of the final hidden states at any of ``PRESERVED_SPARSITIES``."""

PRESERVED_SPARSITIES = (0.05, 0.10, 0.15)

PERCENTILE = 50.0
"""Below which a neuron is skipped."""
