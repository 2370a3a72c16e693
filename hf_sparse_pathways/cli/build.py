"""``sparse-pathways build``: profile, select, and save the full checkpoint in one go."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.info import print_summary
from hf_sparse_pathways.cli.loading import check_output, load_dense, written_whole
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.profile import HELD_OUT, MAX_TOKENS, calibration_texts
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError


def run(  # noqa: PLR0913
    model: opt.Model,
    output: opt.Output,
    domain: opt.Texts = [],  # noqa: B006
    profile: Annotated[
        Path | None, typer.Option(help="A saved profile, instead of --domain.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Fraction of neurons removed: one, or one per block with commas. [0.3]"),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="Instead: remove neurons scoring below this percentile.")
    ] = None,
    pool: Annotated[str, typer.Option(help="Percentile over one layer, or the model.")] = "layer",
    score: Annotated[
        str | None, typer.Option(help="wanda, mean_abs or random. [wanda; mean_abs by percentile]")
    ] = None,
    max_tokens: opt.MaxTokens = MAX_TOKENS,
    max_length: opt.MaxLength = None,
    batch_size: opt.BatchSize = 8,
    held_out: opt.HeldOut = HELD_OUT,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    default_domain: Annotated[
        str | None, typer.Option(help="Domain to use when none is named; dense if not given.")
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Find each domain's neurons and save weights, configuration, tokenizer and pathways."""
    if bool(domain) == (profile is not None):
        raise PathwaysError("Give --domain NAME=PATH (once per domain) or --profile DIR.")
    texts = parse_texts(domain)
    check_output(output, overwrite, "pathways.json")
    rule: dict[str, Any] = {
        "sparsity": _parse_sparsity(sparsity),
        "percentile": percentile,
        "pool": pool,
        "score": score,
    }
    fractions = rule["sparsity"]
    _check_rule(rule, len(fractions) if isinstance(fractions, list) else 1)
    if texts and default_domain is not None and default_domain not in texts:
        raise UnknownNameError("default domain", default_domain, texts)
    calibration = calibration_texts(texts, held_out, seed)
    dense, tokenizer = load_dense(model, dtype)
    _check_model(dense, rule)

    from hf_sparse_pathways.discovery.profiles import Profile
    from hf_sparse_pathways.discovery.profiling import profile as take_profile
    from hf_sparse_pathways.discovery.selection import select
    from hf_sparse_pathways.modeling.model import SparsePathwaysForCausalLM

    if profile is not None:
        taken = Profile.from_pretrained(profile)
    else:
        taken = take_profile(
            dense,
            tokenizer,
            calibration,
            max_tokens=max_tokens,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
        )
    pathways = select(dense, taken, **rule, seed=seed)
    sparse = SparsePathwaysForCausalLM.from_dense(dense, pathways, default_domain=default_domain)
    with written_whole(output) as folder:
        sparse.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print_summary(output)


def _parse_sparsity(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise PathwaysError(
            f"--sparsity {text!r} does not fit; write 0.3, or 0.1,0.2,... with one per block."
        ) from None
    return values[0] if len(values) == 1 else values


def _check_model(dense: Any, rule: dict[str, Any]) -> None:
    """Refuse a model that does not fit before minutes are spent on a profile."""
    from hf_sparse_pathways.ffn.blocks import find_blocks
    from hf_sparse_pathways.modeling.structure import check_convertible

    check_convertible(dense)
    _check_rule(rule, len(find_blocks(dense)))


def _check_rule(rule: dict[str, Any], blocks: int) -> None:
    """Refuse a wrong rule before a model is loaded."""
    from hf_sparse_pathways.discovery.goal import make_goal
    from hf_sparse_pathways.discovery.recipe import resolve_method

    make_goal(rule["sparsity"], rule["percentile"], rule["pool"], blocks)
    if rule["score"] is not None:
        resolve_method(rule["score"])
