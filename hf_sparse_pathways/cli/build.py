"""``sparse-pathways build``: profile, select, and save the full checkpoint in one go."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.budgets import (
    Limits,
    choose_pathways,
    largest_sparsity,
    parse_increase,
    timed,
)
from hf_sparse_pathways.cli.info import print_summary
from hf_sparse_pathways.cli.launch import is_first, join_launch, leave_unless_first
from hf_sparse_pathways.cli.loading import load_dense, unfinished_work
from hf_sparse_pathways.cli.options import parse_sparsities, parse_texts, refuse_beside
from hf_sparse_pathways.cli.profile import (
    HELD_OUT,
    Sampling,
    needs_inputs,
    split_texts,
    take_profile,
)
from hf_sparse_pathways.discovery.documents import ROUTER_TOKENS
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.memory import MAX_MEMORY
from hf_sparse_pathways.outputs import check_output, written_whole

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.expert_selection import ExpertGoal
    from hf_sparse_pathways.discovery.grouping import Grouping
    from hf_sparse_pathways.discovery.profiles import Profile
    from hf_sparse_pathways.pathways.pathway import Pathways

QUICK_TOKENS = 8192
QUICK_RIDGE = "0.01"

LAYOUTS = ("original", "permuted")

EXPERT_RULE = ("experts", "expert_neurons", "expert_score")
"""What of a rule is about routed experts."""

VALIDATION_SHARE = 0.1
"""Of the documents that are not held out: set aside where a limit of quality is searched."""


def run(  # noqa: PLR0913
    ctx: typer.Context,
    model: opt.Model,
    output: opt.Output,
    domain: opt.Texts = [],  # noqa: B006
    profile: Annotated[
        Path | None, typer.Option(help="A saved profile, instead of --domain.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="FFN FLOPs removed, 0.3 or 30%: one, or one per block, commas. [0.3]"),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(help="Instead: remove as much as raises perplexity by at most this: 5%."),
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Instead: remove as much as makes generate() this fast.")
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="Instead: remove neurons scoring below this percentile.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Percentile over one layer, or the model. [layer]")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--score",
            help="obs, or a score: wanda, flap, ... [obs; with --percentile mean_abs]",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="auto, uniform, depth, water_filling, balanced, sensitivity. [auto]"),
    ] = None,
    compensation: Annotated[
        str | None,
        typer.Option(help="none, bias, refit, shared, patch:RANK, bypass:RANK, joined by +."),
    ] = None,
    ridge: Annotated[
        str | None,
        typer.Option(help=f"Of the least squares, or auto. [auto; quick {QUICK_RIDGE}]"),
    ] = None,
    order: Annotated[str, typer.Option(help="auto, sequential or one-shot.")] = "auto",
    multiple: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 1,
    clusters: Annotated[
        int, typer.Option(min=1, help="Clusters of each block's tokens, each with own neurons.")
    ] = 1,
    skip: Annotated[
        float, typer.Option(help="Share of the kept neurons that a token skips, by their gates.")
    ] = 0.0,
    mixture: Annotated[
        int | None,
        typer.Option(help="Groups of each block's neurons, of which a token has --top-k."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Groups that a token has. [2]")] = None,
    always_on: Annotated[
        float | None,
        typer.Option(help="Least share of a token's neurons that every token has. [0.85]"),
    ] = None,
    experts: Annotated[
        float | None,
        typer.Option(help="Share of each layer's routed experts that stays, 0.5. [all]"),
    ] = None,
    expert_neurons: Annotated[
        float | None,
        typer.Option(help="Share of each routed expert's neurons that stays, 0.5. [all]"),
    ] = None,
    expert_score: Annotated[
        str, typer.Option(help="Which experts stay: auto, reap, usage, or added.")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Less text, and all blocks repaired at once.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(help=f"Tokens per domain. [{opt.CALIBRATION_TOKENS}; quick {QUICK_TOKENS}]"),
    ] = None,
    router_tokens: opt.RouterTokens = ROUTER_TOKENS,
    max_length: opt.MaxLength = None,
    batch_size: opt.BatchSize = 8,
    held_out: opt.HeldOut = HELD_OUT,
    max_memory: opt.MaxMemory = MAX_MEMORY,
    precision: opt.Precision = "fastest",
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    default_domain: Annotated[
        str | None,
        typer.Option(help="Domain to use when none is named, or auto; dense if not given."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(help="original, or permuted: each domain's neurons stand together."),
    ] = "original",
    overwrite: opt.Overwrite = False,
) -> None:
    """Find each domain's neurons and save weights, configuration, tokenizer and pathways."""
    if bool(domain) == (profile is not None):
        raise PathwaysError("Give --domain NAME=PATH (once per domain) or --profile DIR.")
    if profile is not None:
        refuse_beside(ctx, "--profile", (*opt.PROFILING, "max_length", "batch_size"))
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    texts = parse_texts(domain)
    check_output(output, overwrite, "pathways.json")
    sparsities = None if sparsity is None else parse_sparsities(sparsity)
    limits = Limits(
        sparsity=sparsities[0] if sparsities and len(sparsities) == 1 else sparsities,
        percentile=percentile,
        pool=pool,
        max_perplexity_increase=parse_increase(max_perplexity_increase),
        target_speedup=target_speedup,
    )
    by_token = clusters > 1 or skip > 0 or mixture is not None
    rule = {
        "method": method,
        "allocation": allocation,
        "compensation": compensation,
        "ridge": _parse_ridge(ridge or (QUICK_RIDGE if quick else "auto")),
        "order": "one-shot" if quick and order == "auto" and not by_token else order,
        "multiple": multiple,
        "precision": precision,
        "seed": seed,
        "clusters": clusters,
        "skip": skip,
        "mixture": _parse_mixture(mixture, top_k, always_on, seed),
        "experts": experts,
        "expert_neurons": expert_neurons,
        "expert_score": expert_score,
    }
    limits.check()
    _check_rule(rule, limits)
    if texts:
        _check_default(default_domain, texts)
    default_tokens = QUICK_TOKENS if quick else opt.CALIBRATION_TOKENS
    sampling = Sampling(
        max_tokens=default_tokens if max_tokens is None else max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
        precision=precision,
        max_memory=max_memory,
        inputs=needs_inputs(compensation),
        validation_share=VALIDATION_SHARE if max_perplexity_increase else 0.0,
        router_tokens=router_tokens,
    )
    launch = join_launch()
    if profile is not None:  # of which nothing is left to share
        leave_unless_first(launch)
    job = _Job(model, dtype, output, default_domain, profile, layout, launch)
    split = split_texts(texts, held_out, seed, sampling.read_tokens)
    job.carry_out(split, sampling, limits, rule)
    print_summary(output)


@dataclass(frozen=True)
class _Job:
    """What is built from what."""

    model: str
    dtype: str
    output: Path
    default_domain: str | None
    profile: Path | None
    layout: str
    launch: Any

    @property
    def _key(self) -> tuple[str, str, str]:
        """What tells this job from others that may run at the same time."""
        return self.model, self.dtype, str(self.output.absolute())

    def carry_out(
        self,
        texts: dict[str, tuple[Any, Any | None]],
        sampling: Sampling,
        limits: Limits,
        rule: dict[str, Any],
    ) -> None:
        """Profile, select, and write the checkpoint."""
        known = None if self.profile is None else self._saved_profile(self.profile)
        dense, tokenizer = load_dense(self.model, self.dtype)
        _check_model(dense, limits, rule)
        if is_first(self.launch):
            limits = timed(dense, limits, rule)
        held_out = {name: split[1] for name, split in texts.items() if split[1] is not None}
        sources = {name: split[0].source for name, split in texts.items()}
        with unfinished_work(self._key, sources, sampling) as work:
            taken = known or self._profile(dense, tokenizer, texts, sampling, work)
            leave_unless_first(self.launch)
            settled = _settle_method(rule, taken, limits)
            pathways = choose_pathways(dense, tokenizer, taken, limits, settled, held_out)
            self._write(dense, tokenizer, pathways)

    def _write(self, dense: Any, tokenizer: Any, pathways: "Pathways") -> None:
        """Write the checkpoint, whole or not at all."""
        from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
        from hf_sparse_pathways.modeling.permutation import permute

        sparse = SparsePathwaysForCausalLM.from_dense(
            dense, pathways, default_domain=self.default_domain
        )
        if self.layout == "permuted":
            sparse = permute(sparse)
        with written_whole(self.output) as folder:
            sparse.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def _profile(
        self,
        dense: Any,
        tokenizer: Any,
        texts: dict[str, tuple[Any, Any | None]],
        sampling: Sampling,
        work: Path,
    ) -> "Profile":
        calibration = {name: split[0] for name, split in texts.items()}
        return take_profile(
            dense, tokenizer, calibration, sampling, work, grams=True, launch=self.launch
        )

    def _saved_profile(self, folder: Path) -> "Profile":
        from hf_sparse_pathways.discovery.profiles import Profile

        taken = Profile.from_pretrained(folder)
        _check_default(self.default_domain, taken.domains)
        return taken


def _check_default(domain: str | None, known: Iterable[str]) -> None:
    from hf_sparse_pathways.pathways.names import AUTO

    if domain not in (None, AUTO, *known):
        raise UnknownNameError("default domain", domain, known)


def _parse_ridge(text: str) -> str | float:
    """Return ``0.01`` as a number and ``auto`` as it is."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise PathwaysError(f"--ridge {text!r} does not fit; write auto or 0.01.") from None


def _parse_mixture(
    count: int | None, top_k: int | None, always_on: float | None, seed: int
) -> "Grouping | None":
    """Return how neurons are divided into groups, if they are."""
    from hf_sparse_pathways.discovery.grouping import Grouping

    given = {"top_k": top_k, "always_on": always_on}
    given = {name: value for name, value in given.items() if value is not None}
    if count is None and given:
        raise PathwaysError("--top-k and --always-on are about the groups of --mixture: give that.")
    return None if count is None else Grouping(count=count, seed=seed, **given)  # type: ignore[arg-type]


def _check_model(dense: Any, limits: Limits, rule: dict[str, Any]) -> None:
    """Refuse a model that does not fit before minutes are spent on a profile."""
    from hf_sparse_pathways.discovery.allocation import check_multiple
    from hf_sparse_pathways.discovery.expert_selection import check_block_options
    from hf_sparse_pathways.modeling.structure import check_convertible
    from hf_sparse_pathways.pathways.base import BaseModel

    check_convertible(dense)
    base = BaseModel.of(dense)
    _expert_goal(rule).check_base(base)
    shapes = base.blocks
    check_block_options(base, {**rule, **asdict(limits)})
    limits.check(len(shapes) or None)
    check_multiple(rule["multiple"], (shape.d_ff for shape in shapes))
    if limits.max_perplexity_increase is not None:
        largest_sparsity(shapes, rule)


def _expert_goal(rule: dict[str, Any]) -> "ExpertGoal":
    """Return what a rule says of routed experts, checked."""
    from hf_sparse_pathways.discovery.expert_selection import ExpertGoal

    share, neurons, score = (rule[name] for name in EXPERT_RULE)
    return ExpertGoal(experts=share, neurons=neurons, score=score)


def _settle_method(rule: dict[str, Any], taken: "Profile", limits: Limits) -> dict[str, Any]:
    """Return a rule with its method, so that a search, which selects often, is told once. Pure."""
    from hf_sparse_pathways.discovery.selection import usual_method

    if not taken.base.blocks:  # no method is about routed experts
        return rule
    return {**rule, "method": rule["method"] or usual_method(taken, limits.percentile)}


def _check_rule(rule: dict[str, Any], limits: Limits) -> None:
    """Refuse a wrong rule before a model is loaded."""
    from hf_sparse_pathways.discovery.goal import check_division
    from hf_sparse_pathways.discovery.recipe import OBS, make_recipe

    usual = OBS if limits.percentile is None else "mean_abs"
    own = {name: value for name, value in rule.items() if name not in EXPERT_RULE}
    make_recipe(**{**own, "method": rule["method"] or usual})
    _expert_goal(rule)
    by_token = rule["clusters"] > 1 or rule["skip"] or rule["mixture"]
    if limits.target_speedup is not None and by_token:
        raise PathwaysError(
            "--target-speedup is found for pathways that compute the same neurons for all tokens: "
            "leave out --clusters, --skip and --mixture, or give the sparsity."
        )
    division = rule["allocation"], rule["multiple"]
    check_division(limits.sparsity, limits.percentile, *division)
