"""Several analysed models side by side: scale against specialisation, with how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hf_sparse_pathways.errors import ArtefactError, PathwaysError
from hf_sparse_pathways.files import read_json
from hf_sparse_pathways.measure import paper
from hf_sparse_pathways.measure.analysis import FORMAT
from hf_sparse_pathways.measure.correlation import Correlation, correlate
from hf_sparse_pathways.measure.figures import Section
from hf_sparse_pathways.measure.specialisation import NORMALISED, PAPER, Criterion
from hf_sparse_pathways.reading import NUMBER, check_kinds
from hf_sparse_pathways.tables import ShownAsTables

ANALYSIS_NAME = "analysis.json"


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """What of one model's analysis is compared.

    Attributes:
        name: The model's name.
        summary: Its shape in words.
        parameters: Number of parameters.
        ffn_share: The FFN's share of the FLOPs per token.
        tokens: Domain -> tokens of the profile.
        specialised: Fraction of neurons by the paper's criterion.
        normalised: The same by ``NORMALISED``.
        mean_excess: Mean excess of a neuron in its strongest domain.
        chance: The paper's fraction on shuffled text; None if it was not taken.
        first_block: Domain -> fraction skipped in the first block, pool ``model``.
    """

    name: str
    summary: str
    parameters: int
    ffn_share: float
    tokens: dict[str, int]
    specialised: float
    normalised: float
    mean_excess: float
    chance: float | None
    first_block: dict[str, float]

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read what ``sparse-pathways analyze`` wrote.

        Raises:
            ArtefactError: It is missing, damaged, of a newer format, or of one domain only.
        """
        values = read_json(folder / ANALYSIS_NAME)
        if values.get("format") != FORMAT:
            raise ArtefactError(
                f"{folder / ANALYSIS_NAME} has format {values.get('format')!r}; this version reads "
                f"{FORMAT}. Analyse the model again."
            )
        if values.get("specialisation", 0) is None:
            raise ArtefactError(f"{folder} is an analysis of one domain: nothing can be compared.")
        try:
            return cls.from_dict(values)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            StopIteration,
        ) as error:
            raise ArtefactError(
                f"{folder / ANALYSIS_NAME} was not written by sparse-pathways analyze, or is "
                f"damaged ({type(error).__name__}: {error}). Analyse the model again."
            ) from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Pick what is compared from the JSON form of an ``Analysis``."""
        pool = next(p for p in values["skippable"] if p["pool"] == "model")
        shuffled = values["shuffled"]
        check_kinds(values, ("base", "summary"), str)
        check_kinds(values["size"], ("parameters",), int)
        check_kinds(values["size"], ("ffn_share",), *NUMBER)
        check_kinds(values["specialisation"], ("mean_excess",), *NUMBER)
        check_kinds(values["tokens"], values["tokens"], int)
        first = {domain: blocks[0] for domain, blocks in pool["per_block"].items()}
        check_kinds(first, values["tokens"], *NUMBER)
        if values["size"]["parameters"] < 1 or not values["tokens"]:
            raise ValueError("a model without parameters or text")
        return cls(
            name=values["base"],
            summary=values["summary"],
            parameters=values["size"]["parameters"],
            ffn_share=values["size"]["ffn_share"],
            tokens=values["tokens"],
            specialised=_overall(values["specialisation"], PAPER),
            normalised=_overall(values["specialisation"], NORMALISED),
            mean_excess=values["specialisation"]["mean_excess"],
            chance=None if shuffled is None else _overall(shuffled, PAPER),
            first_block=first,
        )

    @property
    def label(self) -> str:
        """The last part of the name."""
        return Path(self.name).name or "a model without a name"


@dataclass(frozen=True, kw_only=True)
class ScaleComparison(ShownAsTables):
    """Models side by side.

    Attributes:
        models: In order of size.
        seen: Pearson and Spearman of log10(parameters) against the specialised fraction.
        published: The same of the paper's own models.
    """

    models: tuple[ComparedModel, ...]
    seen: tuple[Correlation, Correlation]
    published: tuple[Correlation, Correlation]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def to_markdown(self, plots: Sequence[str] = ()) -> str:
        """Render the tables."""
        parts = ["# Models compared", *(section.to_markdown() for section in self.sections())]
        parts.extend(f"![{name.removesuffix('.png')}]({name})" for name in plots)
        return "\n\n".join(parts) + "\n"

    def sections(self) -> list[Section]:
        """Return the tables: these models and the paper's, the first blocks, the correlations."""
        domains = list(self.models[0].tokens)
        stated = [
            [f"paper: {model.name}", _count(model.parameters), f"{model.specialised:.1%}"]
            + ["-"] * 5
            for model in paper.MODELS
        ]
        header = ["model", "parameters", str(PAPER), "shuffled", str(NORMALISED), "mean excess"]
        models = Section(
            title="Scale and specialisation",
            note=(
                f"Domains here: {', '.join(domains)}. The paper's models were profiled on other "
                "texts and domains, so its rows are no partners of these."
            ),
            header=[*header, "FFN share", "tokens per domain"],
            rows=[*(_row(model) for model in self.models), *stated],
        )
        first = [
            [model.label, *(f"{model.first_block[domain]:.1%}" for domain in domains)]
            for model in self.models
        ]
        blocks = Section(
            title="Skipped in the first block, pool model",
            note="",
            header=["model", *domains],
            rows=first,
        )
        return [models, blocks, self._correlations()]

    def _correlations(self) -> Section:
        rows = []
        for whose, pair in (("here", self.seen), ("paper's models", self.published)):
            for correlation in pair:
                low_high = correlation.interval
                rows.append(
                    [
                        f"{whose}: {correlation.kind}",
                        "-" if correlation.value is None else f"{correlation.value:.2f}",
                        f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else "-",
                        str(correlation.n),
                        correlation.caveat or "-",
                    ]
                )
        return Section(
            title=f"Correlation of log10(parameters) with the specialised fraction ({PAPER})",
            note="Intervals by Fisher's z; models are no random sample, so even these flatter.",
            header=["correlation", "value", "95 % interval", "n", "caveat"],
            rows=rows,
        )


def compare_models(models: Sequence[ComparedModel]) -> ScaleComparison:
    """Put models side by side. Pure.

    Raises:
        PathwaysError: There are fewer than two, or their domains differ.
    """
    if len(models) < 2:
        raise PathwaysError("Give at least two analysed models: --compare DIR --compare DIR.")
    first = models[0]
    for other in models[1:]:
        if set(other.tokens) != set(first.tokens):
            raise PathwaysError(
                f"{first.label} was analysed on {', '.join(first.tokens)}, but {other.label} on "
                f"{', '.join(other.tokens)}. Specialisation depends on the domains: analyse all "
                "models on the same."
            )
    ordered = sorted(models, key=lambda model: model.parameters)
    return ScaleComparison(
        models=tuple(ordered),
        seen=correlate(
            [math.log10(model.parameters) for model in ordered],
            [model.specialised for model in ordered],
        ),
        published=correlate(
            [math.log10(model.parameters) for model in paper.MODELS],
            [model.specialised for model in paper.MODELS],
        ),
    )


def _overall(specialisation: dict[str, Any], criterion: Criterion) -> float:
    wanted = asdict(criterion)
    return next(
        float(fraction["overall"])
        for fraction in specialisation["fractions"]
        if fraction["criterion"] == wanted
    )


def _row(model: ComparedModel) -> list[str]:
    tokens = sorted(model.tokens.values())
    return [
        model.label,
        _count(model.parameters),
        f"{model.specialised:.1%}",
        "-" if model.chance is None else f"{model.chance:.1%}",
        f"{model.normalised:.1%}",
        f"{model.mean_excess:.3f}",
        f"{model.ffn_share:.1%}",
        " to ".join(map(str, dict.fromkeys([tokens[0], tokens[-1]]))),
    ]


def _count(parameters: float) -> str:
    """Render a number of parameters in millions or billions."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
