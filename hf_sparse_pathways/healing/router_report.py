"""What training the routers of groups of neurons brought, as values that render as tables."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.healing.router_settings import RouterSettings
from hf_sparse_pathways.healing.utilisation import Utilisation
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.tables import ShownAsTables, Table


@dataclass(frozen=True, kw_only=True)
class RouterReport(ShownAsTables):
    """One domain's training. Losses are in nats per token of the same validation windows.

    Attributes:
        domain: Which.
        settings: All of them.
        tokens: Tokens trained on.
        dense: The dense model's next-token loss.
        losses: The pathway's, before and after, in its stored precision.
        distances: What is minimised, without the terms on routers, before and after.
        utilisation: Of the groups, before and after.
        history: What was logged on the way: losses, and how the groups were used.
    """

    domain: str
    settings: RouterSettings
    tokens: int
    dense: float
    losses: tuple[float, float]
    distances: tuple[float, float]
    utilisation: tuple[Utilisation, Utilisation]
    history: tuple[Mapping[str, float], ...]

    def sections(self) -> list[Table]:
        """Return a table of before and after."""
        rows = [
            [
                name,
                f"{math.exp(loss - self.dense):.3f}",
                f"{distance:.4f}",
                f"{used.entropy:.3f}",
                f"{used.dead}",
                f"{used.largest:.1f}",
            ]
            for name, loss, distance, used in zip(
                ("before", "after"), self.losses, self.distances, self.utilisation, strict=True
            )
        ]
        header = ["routers", "perplexity of dense", self.settings.loss, "entropy", "dead groups"]
        return [
            Table(
                title=f"{self.domain}: routers trained on {self.tokens} tokens",
                note="Entropy: of even use. Largest: the most used group's share over an even one.",
                header=[*header, "largest"],
                rows=rows,
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        used = [each.described() for each in self.utilisation]
        return {**asdict(self), "settings": self.settings.described(), "utilisation": used}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRouters(ShownAsTables):
    """What ``train_routers`` made.

    Attributes:
        pathways: The model's pathways, the trained ones in place of theirs.
        reports: Domain -> what it brought.
    """

    pathways: Pathways
    reports: Mapping[str, RouterReport]

    def sections(self) -> list[Table]:
        """Return the tables of all reports."""
        return [table for report in self.reports.values() for table in report.sections()]
