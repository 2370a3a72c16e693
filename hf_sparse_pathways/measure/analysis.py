"""The paper's analysis of one model: where its neurons specialise, and what that is worth.

From an activation profile follow the specialised and the skippable fraction, the overlap between
domains, the speed-up that skipping could give, and all of it by depth (*layer roles*). What has to
be measured on the model stands beside it: see ``experiments.py``.

Source: A. Young 2026, "Sparse Pathways".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.measure.entanglement import Entanglement, summarise_entanglement
from hf_sparse_pathways.measure.experiments import Experiments
from hf_sparse_pathways.measure.gating_report import LayerGating
from hf_sparse_pathways.measure.model_size import ModelSize
from hf_sparse_pathways.measure.paper import PERCENTILE
from hf_sparse_pathways.measure.reading import read_report
from hf_sparse_pathways.measure.routed_experts import RoutedUsage, summarise_experts
from hf_sparse_pathways.measure.skipping import (
    PotentialSpeedup,
    SkipOverlap,
    SkippableFraction,
    measure_overlap,
    measure_skippable,
    potential_speedups,
)
from hf_sparse_pathways.measure.specialisation import (
    NORMALISED,
    PAPER,
    Criterion,
    Specialisation,
    measure_specialisation,
)
from hf_sparse_pathways.tables import ShownAsTables

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.figures import Section

FORMAT = 1
"""Version of the JSON form."""

ROLE_SPARSITY = 0.5
"""At which layer roles compare the domains' skipped neurons."""


@dataclass(frozen=True, kw_only=True)
class LayerRole:
    """A stretch of FFN blocks by depth, and what they do.

    Attributes:
        name: ``early``, ``middle`` or ``late``.
        first: Index of the first block.
        last: Index of the last block.
        specialised: Mean over blocks of the fraction with a ratio above 2; None with one domain.
        specialised_normalised: The same with an excess above 0.25.
        skippable: Domain -> mean fraction skipped at the percentile, pooled over the model.
        overlap: Mean Jaccard index of the domains' skipped halves; None with one domain.
    """

    name: str
    first: int
    last: int
    specialised: float | None
    specialised_normalised: float | None
    skippable: dict[str, float]
    overlap: float | None


@dataclass(frozen=True, kw_only=True)
class Analysis(ShownAsTables):
    """What is known of one model's neurons and domains.

    Attributes:
        base: The model's name.
        summary: Its shape in words.
        size: Parameters and FLOPs.
        routed: Modules with routed experts.
        tokens: Domain -> tokens of the profile.
        blocks: Names of the FFN blocks.
        percentile: Below which a neuron is skipped.
        specialisation: None with one domain.
        shuffled: That of shuffled text, which is chance; None if it was not taken.
        skippable: One per pool.
        speedups: One per pool and domain.
        overlaps: One per sparsity.
        roles: Early, middle and late blocks.
        experiments: None if nothing was measured.
        experts: What the routed experts do, layer by layer; none in what was not profiled so.
        entanglement: None if the profile does not hold it.
        gating: What gates of some sgatlin layers stand for; none if nothing was measured.
    """

    base: str
    summary: str
    size: ModelSize
    routed: tuple[str, ...]
    tokens: dict[str, int]
    blocks: tuple[str, ...]
    percentile: float
    specialisation: Specialisation | None
    shuffled: Specialisation | None
    skippable: tuple[SkippableFraction, ...]
    speedups: tuple[PotentialSpeedup, ...]
    overlaps: tuple[SkipOverlap, ...]
    roles: tuple[LayerRole, ...]
    experiments: Experiments | None
    experts: tuple[RoutedUsage, ...] = ()
    entanglement: Entanglement | None = None
    gating: tuple[LayerGating, ...] = ()

    @property
    def domains(self) -> list[str]:
        """The domains' names."""
        return list(self.tokens)

    def skippable_by(self, pool: str) -> SkippableFraction:
        """Return the skippable fractions under one pool."""
        return next(fractions for fractions in self.skippable if fractions.pool == pool)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return an analysis from JSON values.

        Raises:
            ArtefactError: The format is another one, or a value is missing or of the wrong kind.
        """
        if data.get("format") != FORMAT:
            raise ArtefactError(
                f"This analysis has format {data.get('format')!r}; this version reads {FORMAT}. "
                "Analyse the model again."
            )
        return read_report(cls, data, "an analysis")

    def sections(self) -> "Iterable[Section]":
        """Return the report's tables."""
        from hf_sparse_pathways.measure.analysis_report import sections

        return sections(self)

    def with_measurements(
        self, *, experiments: Experiments | None, shuffled: Specialisation | None
    ) -> Self:
        """Return a copy with what was measured. Pure."""
        return replace(self, experiments=experiments, shuffled=shuffled)

    def with_gating(self, gating: tuple[LayerGating, ...]) -> Self:
        """Return a copy with what the gates stand for. Pure."""
        return replace(self, gating=gating)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        share = {"ffn_share": self.size.ffn_share}
        values = asdict(self)
        return {"format": FORMAT, **values, "size": {**values["size"], **share}}


def analyse(profile: Profile, size: ModelSize, *, percentile: float = PERCENTILE) -> Analysis:
    """Return what follows from a profile. Pure.

    Args:
        profile: The activation profile; Gram matrices are not used.
        size: Of the profiled model.
        percentile: Below which a neuron is skipped, in [0, 100).

    Raises:
        PathwaysError: The percentile is out of range.
    """
    analysis = Analysis(
        base=profile.base.name,
        summary=profile.base.summary,
        size=size,
        routed=profile.base.routed,
        tokens={name: domain.tokens for name, domain in profile.by_domain.items()},
        blocks=tuple(shape.name for shape in profile.base.blocks),
        percentile=percentile,
        specialisation=None,
        shuffled=None,
        skippable=(),
        speedups=(),
        overlaps=(),
        roles=(),
        experiments=None,
        experts=summarise_experts(profile),
    )
    return _with_blocks(analysis, profile) if profile.base.blocks else analysis


def _with_blocks(analysis: Analysis, profile: Profile) -> Analysis:
    """Return an analysis with what follows from the FFN blocks' statistics. Pure."""
    size, skippable = analysis.size, measure_skippable(profile, analysis.percentile)
    several = len(profile.domains) > 1
    specialisation = measure_specialisation(profile) if several else None
    return replace(
        analysis,
        specialisation=specialisation,
        skippable=skippable,
        speedups=potential_speedups(skippable, size),
        overlaps=measure_overlap(profile),
        roles=_roles(profile, specialisation, next(f for f in skippable if f.pool == "model")),
        entanglement=summarise_entanglement(profile),
    )


def thirds(count: int) -> list[tuple[str, range]]:
    """Return the early, middle and late thirds of blocks that there are, none of them empty."""
    names = ("early", "middle", "late") if count > 2 else ("early", "late")[:count]
    cuts = [round(part * count / len(names)) for part in range(len(names) + 1)]
    return [(name, range(cuts[i], cuts[i + 1])) for i, name in enumerate(names)]


def _roles(
    profile: Profile, specialisation: Specialisation | None, skippable: SkippableFraction
) -> tuple[LayerRole, ...]:
    (halves,) = measure_overlap(profile, [ROLE_SPARSITY])
    return tuple(
        LayerRole(
            name=name,
            first=part[0],
            last=part[-1],
            specialised=_part(_per_block(specialisation, PAPER), part),
            specialised_normalised=_part(_per_block(specialisation, NORMALISED), part),
            skippable={
                domain: _mean([fractions[index] for index in part])
                for domain, fractions in skippable.per_block.items()
            },
            overlap=_part(mean_overlap_per_block(halves), part),
        )
        for name, part in thirds(len(profile.base.blocks))
    )


def mean_overlap_per_block(overlap: SkipOverlap) -> list[float] | None:
    """Return each block's mean Jaccard index over the pairs of domains; None without pairs."""
    if not overlap.pairs:
        return None
    columns = zip(*(pair.per_block for pair in overlap.pairs), strict=True)
    return [_mean([value or 0.0 for value in column]) for column in columns]


def _per_block(
    specialisation: Specialisation | None, criterion: Criterion
) -> Sequence[float] | None:
    return None if specialisation is None else specialisation.of(criterion).per_block


def _part(values: Sequence[float] | None, part: range) -> float | None:
    return None if values is None else _mean([values[index] for index in part])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
