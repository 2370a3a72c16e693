"""How much ``build`` removes: a sparsity, or what a limit of quality or speed allows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from hf_sparse_pathways.cli.options import parse_fraction
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.budget import Search
    from hf_sparse_pathways.discovery.profiles import Profile
    from hf_sparse_pathways.pathways.base import BlockShape
    from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

TEST_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which of the limits was given; at most one is not None."""

    sparsity: float | list[float] | None
    percentile: float | None
    pool: str | None
    max_perplexity_increase: float | None
    target_speedup: float | None

    @property
    def given(self) -> list[str]:
        """The options of those that were given."""
        options = {
            "--sparsity": self.sparsity,
            "--percentile": self.percentile,
            "--max-perplexity-increase": self.max_perplexity_increase,
            "--target-speedup": self.target_speedup,
        }
        return [name for name, value in options.items() if value is not None]

    def check(self, blocks: int | None = None) -> None:
        """Check that at most one limit was given, and that it can be met.

        Raises:
            PathwaysError: Two were given, or a number is out of range.
        """
        from hf_sparse_pathways.discovery.goal import make_goal

        if len(self.given) > 1:
            raise PathwaysError(f"Give one of {' and '.join(self.given)}, not both.")
        if self.target_speedup is not None and not self.target_speedup > 1.0:
            raise PathwaysError(f"--target-speedup has to be above 1, got {self.target_speedup}.")
        several = isinstance(self.sparsity, list)
        count = len(self.sparsity) if isinstance(self.sparsity, list) else 1
        make_goal(self.sparsity, self.percentile, self.pool, blocks or (count if several else 1))


def parse_increase(text: str | None) -> float | None:
    """Return ``5%`` or ``0.05`` as a fraction.

    Raises:
        PathwaysError: It is neither, not positive, or above 1 without a percent sign.
    """
    if text is None:
        return None
    try:
        value = parse_fraction(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise PathwaysError(f"--max-perplexity-increase {text!r} does not fit; write 5% or 0.05.")
    if value > 1.0 and "%" not in text:
        raise PathwaysError(
            f"--max-perplexity-increase {text!r} is {value:.0%}; write {text}%, or {value:.0%}."
        )
    return value


def largest_sparsity(shapes: "Sequence[BlockShape]", rule: Mapping[str, Any]) -> float:
    """Return the sparsity up to which a rule's bypass and multiple leave room for neurons.

    Raises:
        PathwaysError: There is none.
    """
    from hf_sparse_pathways.discovery.allocation import most_sparsity

    return most_sparsity(
        shapes,
        bypass_rank=_bypass_rank(rule),
        multiple=rule.get("multiple", 1),
        clusters=rule["mixture"].count if rule.get("mixture") else rule.get("clusters", 1),
    )


def _bypass_rank(rule: Mapping[str, Any]) -> int:
    from hf_sparse_pathways.discovery.recipe import parse_compensation

    return parse_compensation(rule.get("compensation") or "none").bypass_rank


def timed(dense: Any, limits: Limits, rule: Mapping[str, Any]) -> Limits:
    """Return a limit of speed as the sparsity that meets it here, and say so; others as they are.

    Raises:
        PathwaysError: The speed is out of reach.
    """
    if limits.target_speedup is None:
        return limits
    from hf_sparse_pathways.measure.speed_target import sparsity_for_speedup

    rank, multiple = _bypass_rank(rule), rule.get("multiple", 1)
    found = sparsity_for_speedup(dense, limits.target_speedup, bypass_rank=rank, multiple=multiple)
    typer.echo(str(found))
    return replace(limits, sparsity=found.sparsity, target_speedup=None)


def choose_pathways(
    dense: Any,
    tokenizer: Any,
    profile: "Profile",
    limits: Limits,
    rule: Mapping[str, Any],
    held_out: Mapping[str, Any],
) -> "Pathways":
    """Select pathways within the limits, and say what was chosen and why."""
    from hf_sparse_pathways.discovery.selection import select

    if limits.max_perplexity_increase is not None:
        return _within_increase(dense, tokenizer, profile, limits, rule, held_out)
    return select(
        dense,
        profile,
        sparsity=limits.sparsity,
        percentile=limits.percentile,
        pool=limits.pool,
        **rule,
    )


def _within_increase(
    dense: Any,
    tokenizer: Any,
    profile: "Profile",
    limits: Limits,
    rule: Mapping[str, Any],
    held_out: Mapping[str, Any],
) -> "Pathways":
    """Search on validation text, select, and check on held-out text."""
    from hf_sparse_pathways.discovery.budget import fit_sparsities
    from hf_sparse_pathways.discovery.selection import select

    latest: dict[str, Pathway] = {}

    def choose(sparsities: Mapping[str, float]) -> "Pathways":
        wanted = {name: sparsities.get(name, 0.0) for name in profile.domains}
        others = {name: made for name, made in latest.items() if name not in sparsities}
        found = select(dense, profile, sparsity=wanted, made=others, controls=False, **rule)
        latest.update(found.by_domain)
        return found

    increase = limits.max_perplexity_increase or 0.0
    searches = fit_sparsities(
        dense,
        profile,
        max_perplexity_increase=increase,
        choose=choose,
        room=largest_sparsity(profile.base.blocks, rule),
    )
    chosen = {name: search.best for name, search in searches.items()}
    made = {name: search.pathway for name, search in searches.items() if search.pathway is not None}
    pathways = select(dense, profile, sparsity=chosen, made=made, **rule)
    _report(increase, searches, _measure(dense, tokenizer, pathways, held_out))
    return pathways


def _measure(
    dense: Any, tokenizer: Any, pathways: "Pathways", held_out: Mapping[str, Any]
) -> dict[str, float | str]:
    """Return each domain's increase of perplexity on held-out text, as a fraction, or why none."""
    from hf_sparse_pathways.measure.quality import evaluate
    from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM

    if not held_out:
        return dict.fromkeys(pathways.domains, "With --profile or --held-out 0 there is none.")
    sparse = SparsePathwaysForCausalLM.from_dense(dense, pathways)
    found: dict[str, float | str] = {}
    for name, text in held_out.items():
        try:
            report = evaluate(
                sparse, tokenizer, {name: text}, controls=False, max_tokens=TEST_TOKENS
            )
        except PathwaysError as error:  # the search has taken long: its result is kept
            found[name] = str(error)
        else:
            found[name] = next(row.ratio for row in report.rows if row.role == "pathway") - 1.0
    return found


def _report(
    increase: float, searches: "Mapping[str, Search]", found: Mapping[str, float | str]
) -> None:
    """Print what was chosen, and what a reader of the table could miss."""
    digits = max(1, math.ceil(-2.0 - math.log10(increase)))
    rows, notes = [], []
    for name, search in searches.items():
        rises = {s: f"{math.expm1(rise):+.{digits}%}" for s, rise in sorted(search.rises.items())}
        tried = ", ".join(f"{sparsity:.1%}: {rise}" for sparsity, rise in rises.items())
        validation = rises.get(search.best, f"{0.0:+.{digits}%}")
        test = found[name]
        if isinstance(test, str):
            on_test = "not measured"
            notes.append(f"{name}: not measured on held-out text. {test}")
        else:
            on_test = f"{test:+.{digits}%}"
            if test > increase:
                on_test += " (above)"
                notes.append(
                    f"{name}: on held-out text the increase is above the limit. Give a lower "
                    "limit, or more text."
                )
        if not search.best:
            notes.append(f"{name}: nothing that was tried is within the limit; all is kept.")
        rows.append([name, f"{search.best:.1%}", validation, on_test, tried])
    header = ["domain", "sparsity", "validation", "held out", "tried (on validation)"]
    limit = f"{increase:+.{digits}%}"
    print_table(f"largest sparsity within {limit} perplexity on validation text", header, rows)
    for note in notes:
        typer.echo(note)
