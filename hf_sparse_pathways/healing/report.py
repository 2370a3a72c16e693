"""What healing brought, beside the dense model and the dense model tuned equally."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.healing.training import CurvePoint
from hf_sparse_pathways.tables import ShownAsTables, Table


@dataclass(frozen=True, kw_only=True)
class HealingReport(ShownAsTables):
    """One domain's healing. Losses are in nats per token of the same validation windows.

    Attributes:
        domain: Which.
        settings: All of them.
        source: What the training text was read from.
        tokens: Tokens trained on, up to the end of the run; with what the dense model took first.
        passes: How often the text was gone through.
        seconds: Time that this took; what the dense partner took besides is apart.
        validation_tokens: Tokens that the losses are means over.
        dense: The untouched dense model's loss.
        before: The pathway's loss before healing.
        healed: The loss of what was returned, folded and in its stored precision.
        tuned: The equally tuned dense model's loss; None without a dense partner.
        curve: The pathway's run; with ``dense_first`` from the cut on.
        dense_curve: The dense model's run, which without a partner ends at the cut; empty if it was
            not trained.
    """

    domain: str
    settings: HealingSettings
    source: str
    tokens: int
    passes: int
    seconds: float
    validation_tokens: int
    dense: float
    before: float
    healed: float
    tuned: float | None
    curve: tuple[CurvePoint, ...]
    dense_curve: tuple[CurvePoint, ...]

    @property
    def ratio_before(self) -> float:
        """Perplexity before healing over the dense model's."""
        return math.exp(self.before - self.dense)

    @property
    def ratio(self) -> float:
        """Perplexity of the healed pathway over the dense model's: adaptation counts as healing."""
        return math.exp(self.healed - self.dense)

    @property
    def ratio_tuned(self) -> float | None:
        """Perplexity of the tuned dense model over the dense model's."""
        return None if self.tuned is None else math.exp(self.tuned - self.dense)

    @property
    def honest_ratio(self) -> float | None:
        """Perplexity of the healed pathway over the equally tuned dense model's: what counts."""
        return None if self.tuned is None else math.exp(self.healed - self.tuned)

    def sections(self) -> list[Table]:
        """Return the table of losses beside the dense model's, untouched and tuned."""
        arms = {"dense": self.dense, "pathway": self.before, "healed pathway": self.healed}
        header = ["arm", "perplexity", "of dense"]
        if self.tuned is not None:
            arms["dense, tuned equally"] = self.tuned
            header.append("of dense tuned")
        return [
            Table(
                title=f"{self.domain}: {self.tokens} tokens in {self.seconds:.0f} s; perplexity on "
                f"{self.validation_tokens} validation tokens",
                note="",
                header=header,
                rows=[[name, *self._figures(loss)] for name, loss in arms.items()],
            )
        ]

    def _figures(self, loss: float) -> list[str]:
        """Return a perplexity, and its ratios to the dense models'."""
        figures = [f"{math.exp(loss):.2f}", f"{math.exp(loss - self.dense):.3f}"]
        return figures if self.tuned is None else [*figures, f"{math.exp(loss - self.tuned):.3f}"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            **asdict(self),
            "settings": self.settings.described(),
            "ratio_before": self.ratio_before,
            "ratio": self.ratio,
            "ratio_tuned": self.ratio_tuned,
            "honest_ratio": self.honest_ratio,
        }
