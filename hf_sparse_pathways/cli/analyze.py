"""``sparse-pathways analyze``: where a model's neurons specialise, and what that is worth."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_dense, unfinished_work
from hf_sparse_pathways.cli.options import parse_texts, refuse_beside
from hf_sparse_pathways.cli.profile import HELD_OUT, Sampling, split_texts, take_profile
from hf_sparse_pathways.cli.report_folder import load_plots, write_report
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError, TextError
from hf_sparse_pathways.measure.paper import PERCENTILE
from hf_sparse_pathways.memory import MAX_MEMORY
from hf_sparse_pathways.outputs import check_output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_sparse_pathways.discovery.profiles import Profile
    from hf_sparse_pathways.measure.analysis import Analysis
    from hf_sparse_pathways.measure.figures import Section

TOKENS = 8192
EVALUATION_TOKENS = 2048

TAKING = ("entanglement", *opt.PROFILING)
"""Parameters that do nothing where no profile is taken."""

RUNNING = ("eval_tokens", "max_length", "batch_size", "seed", "precision")
"""Parameters that do nothing where the model is not run."""


def run(  # noqa: PLR0913
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id or folder of a dense model.")
    ] = None,
    domain: opt.Texts = [],  # noqa: B006
    profile: Annotated[
        Path | None, typer.Option(help="A saved profile; text is then for experiments only.")
    ] = None,
    compare: Annotated[
        list[Path],
        typer.Option(metavar="DIR", help="Instead: an earlier output. Repeat for more models."),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write JSON, Markdown and plots.")
    ] = None,
    experiments: Annotated[
        bool,
        typer.Option(
            help="Run the model on held-out text: preservation, selection; profile shuffled text."
        ),
    ] = True,
    entanglement: Annotated[
        bool,
        typer.Option(
            "--entanglement", help="Measure how far from normal each neuron's products are, too."
        ),
    ] = False,
    percentile: Annotated[
        float, typer.Option(help="Below which of a domain's activations a neuron is skippable.")
    ] = PERCENTILE,
    max_tokens: opt.MaxTokens = TOKENS,
    eval_tokens: Annotated[
        int, typer.Option(help="Held-out tokens per domain on which experiments are scored.")
    ] = EVALUATION_TOKENS,
    max_length: opt.MaxLength = None,
    batch_size: opt.BatchSize = 4,
    held_out: opt.HeldOut = HELD_OUT,
    seed: opt.Seed = 0,
    max_memory: opt.MaxMemory = MAX_MEMORY,
    precision: opt.Precision = "fastest",
    dtype: opt.Dtype = "auto",
    plots: opt.Plots = True,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Analyse specialisation, skippable neurons, overlap and layer roles; compare models."""
    if compare:
        refuse_beside(ctx, "--compare", ("percentile", "experiments", *TAKING, *RUNNING))
    if profile is not None:
        refuse_beside(ctx, "--profile", TAKING if domain else (*TAKING, *RUNNING))
    delivery = Delivery(output=output, plots=plots, as_json=as_json)
    delivery.check(overwrite, "models.json" if compare else "analysis.json")
    if compare:
        if model is not None or domain or profile is not None:
            raise PathwaysError("--compare reads earlier outputs: give no MODEL, text or profile.")
        delivery.compare(compare)
        return
    if model is None:
        raise PathwaysError("Give a MODEL to analyse, or --compare DIR for analysed ones.")
    if not domain and profile is None:
        raise PathwaysError("Give --domain NAME=PATH (once per domain) or --profile DIR.")
    job = Job(
        model=model,
        dtype=dtype,
        profile=profile,
        experiments=experiments,
        entanglement=entanglement,
        percentile=percentile,
        eval_tokens=eval_tokens,
        sampling=Sampling(
            max_tokens=max_tokens,
            max_length=max_length,
            batch_size=batch_size,
            held_out=held_out,
            seed=seed,
            precision=precision,
            max_memory=max_memory,
        ),
    )
    delivery.analysis(job.carry_out(parse_texts(domain)))


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Where results go."""

    output: Path | None
    plots: bool
    as_json: bool

    def check(self, overwrite: bool, marker: str) -> None:
        """Refuse what cannot be written before minutes are spent."""
        if self.output is not None:
            check_output(self.output, overwrite, marker)
            if self.plots:
                load_plots()

    def analysis(self, analysis: "Analysis") -> None:
        """Write and print one model's analysis."""
        from hf_sparse_pathways.measure.analysis_report import describe, sections, to_markdown

        if self.output is not None:
            figures = load_plots().draw_all(analysis) if self.plots else None
            write_report(
                self.output,
                "analysis",
                analysis.to_dict(),
                lambda pictures: to_markdown(analysis, pictures),
                figures,
            )
        self._print(analysis.to_dict(), describe(analysis), sections(analysis))

    def compare(self, folders: list[Path]) -> None:
        """Write and print several models' comparison."""
        from hf_sparse_pathways.measure.scale import ComparedModel, compare_models

        compared = compare_models([ComparedModel.from_folder(folder) for folder in folders])
        if self.output is not None:
            figures = {"scale": load_plots().plot_scale(compared)} if self.plots else None
            write_report(self.output, "models", compared.to_dict(), compared.to_markdown, figures)
        self._print(compared.to_dict(), "", compared.sections())

    def _print(self, values: dict[str, Any], intro: str, tables: "Iterable[Section]") -> None:
        if self.as_json:
            typer.echo(json.dumps(values, indent=2, allow_nan=False))
            return
        if intro:
            typer.echo(f"{intro}\n")
        for section in tables:
            print_table(section.title, section.header, section.rows)
        if self.output is not None:
            typer.echo(f"-> {self.output}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is analysed from what."""

    model: str
    dtype: str
    profile: Path | None
    experiments: bool
    entanglement: bool
    percentile: float
    eval_tokens: int
    sampling: Sampling

    def carry_out(self, texts: opt.Sources) -> "Analysis":
        """Profile the model, analyse it, and measure."""
        from hf_sparse_pathways.discovery.percentile import POOLS, check_percentile
        from hf_sparse_pathways.measure.analysis import analyse
        from hf_sparse_pathways.measure.gating_report import summarise_gating
        from hf_sparse_pathways.measure.model_size import ModelSize
        from hf_sparse_pathways.pathways.base import BaseModel

        check_percentile(self.percentile, POOLS[0])
        split = self._split(texts)
        dense, tokenizer = load_dense(self.model, self.dtype)
        with unfinished_work("analyze", self.model, self.dtype, texts, self.sampling) as work:
            taken = self._profile(dense, tokenizer, split, work)
            taken.base.check_same(BaseModel.of(dense))
            analysis = analyse(taken, ModelSize.of(dense), percentile=self.percentile)
            if self.experiments and texts:
                held_out = [one for _, kept in split.values() for one in kept.items]
                gating = summarise_gating(
                    dense,
                    tokenizer,
                    [document.text for document in held_out],
                    max_tokens=self.eval_tokens * len(split),
                    seed=self.sampling.seed,
                )
                analysis = analysis.with_gating(gating)
                if taken.base.blocks:
                    return self._measure(analysis, dense, tokenizer, taken, split)
        return analysis

    def _split(self, texts: opt.Sources) -> dict[str, tuple[Any, Any]]:
        """Return each domain's calibration and held-out documents."""
        seed, tokens = self.sampling.seed, self.sampling.max_tokens + self.eval_tokens
        if self.profile is not None:  # all of the text that it was not taken on is held out
            whole = split_texts(texts, 0.0, seed, tokens)
            return {name: (documents, documents) for name, (documents, _) in whole.items()}
        split = split_texts(texts, self.sampling.held_out, seed, tokens)
        if self.experiments and self.sampling.held_out == 0:
            raise TextError(
                "Experiments need held-out text: raise --held-out, or --no-experiments."
            )
        return split

    def _profile(
        self, dense: Any, tokenizer: Any, split: dict[str, tuple[Any, Any]], work: Path
    ) -> "Profile":
        from hf_sparse_pathways.discovery.profiles import Profile

        if self.profile is not None:
            return Profile.from_pretrained(self.profile)
        calibration = {name: documents[0] for name, documents in split.items()}
        # Gram matrices serve but one arm of the experiments.
        return take_profile(
            dense,
            tokenizer,
            calibration,
            self.sampling,
            work,
            grams=self.experiments,
            entanglement=self.entanglement,
        )

    def _measure(
        self,
        analysis: "Analysis",
        dense: Any,
        tokenizer: Any,
        taken: "Profile",
        split: dict[str, tuple[Any, Any]],
    ) -> "Analysis":
        from hf_sparse_pathways.measure.experiments import run_experiments, shuffled_profile
        from hf_sparse_pathways.measure.specialisation import measure_specialisation

        sampling = self.sampling
        held_out = {name: documents[1] for name, documents in split.items()}
        running: dict[str, Any] = {
            "max_length": sampling.max_length,
            "batch_size": sampling.batch_size,
            "seed": sampling.seed,
        }
        scored = {"max_tokens": self.eval_tokens, **running}
        found = run_experiments(
            dense, tokenizer, taken, held_out, precision=sampling.precision, **scored
        )
        shuffled = shuffled_profile(
            dense, tokenizer, taken, precision=sampling.precision, **running
        )
        chance = None if shuffled is None else measure_specialisation(shuffled)
        measured = analysis.with_measurements(experiments=found, shuffled=chance)
        if analysis.entanglement is None:
            return measured
        from hf_sparse_pathways.measure.entangled_rows import relate_entanglement

        relations, harms = relate_entanglement(dense, tokenizer, taken, held_out, **scored)
        known = replace(analysis.entanglement, relations=relations, harms=harms)
        return replace(measured, entanglement=known)
