"""``sparse-pathways heal``: train what the pathways of a saved model keep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse, unfinished_work
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.profile import HELD_OUT, calibration_texts
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.cli.training import ADAPTERS, check_domains, write_checkpoint
from hf_sparse_pathways.healing.settings import LEARNING_RATES, HealingSettings
from hf_sparse_pathways.outputs import check_output

USUAL = HealingSettings()
_RATES = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())


def run(  # noqa: PLR0913
    folder: opt.Folder,
    domain: opt.Texts,
    output: opt.Output,
    tokens: opt.TrainingTokens = USUAL.tokens,
    steps: Annotated[int | None, typer.Option(help="Instead of --tokens: steps.")] = None,
    train: Annotated[str, typer.Option(help="lora, or weights: all kept ones.")] = USUAL.train,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = USUAL.rank,
    loss: Annotated[
        str, typer.Option(help="lm, kl, hidden, joined by + and with factors: lm+kl:0.5.")
    ] = USUAL.loss,
    teacher: Annotated[
        str,
        typer.Option(
            help="Of kl and hidden: dense, tuned (the dense partner), or cut (dense, at the cut)."
        ),
    ] = USUAL.teacher,
    dense_partner: Annotated[
        bool, typer.Option("--dense-partner", help="Tune the dense model equally, to compare.")
    ] = False,
    dense_first: Annotated[
        float,
        typer.Option(help="Fraction of the steps that all neurons learn in before the cut."),
    ] = USUAL.dense_first,
    attention: Annotated[
        bool, typer.Option("--attention", help="LoRA on the attention too; needs --keep lora.")
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            help="folded into the pathway, or lora: a PEFT adapter in adapters/DOMAIN of the "
            "output, for PeftModel.from_pretrained(model, ...)."
        ),
    ] = USUAL.keep,
    learning_rate: Annotated[float | None, typer.Option(help=f"Highest rate. [{_RATES}]")] = None,
    batch_size: opt.BatchSize = USUAL.batch_size,
    accumulate: opt.Accumulate = USUAL.accumulate,
    max_length: opt.MaxLength = None,
    validation_tokens: opt.ValidationTokens = USUAL.validation_tokens,
    validations: opt.Validations = USUAL.validations,
    patience: Annotated[
        int, typer.Option(help="Stop after so many of these without a new best.")
    ] = USUAL.patience,
    held_out: opt.HeldOut = HELD_OUT,
    precision: opt.Precision = USUAL.precision,
    seed: opt.Seed = USUAL.seed,
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
) -> None:
    """Heal some domains' pathways and save the model with them.

    Give the texts, --held-out and --seed that it was built with: held-out documents are never
    trained on. An interrupted run goes on where it stood when it is started again with the same
    options.
    """
    settings = HealingSettings(
        train=train,
        rank=rank,
        attention=attention,
        keep=keep,
        loss=loss,
        teacher=teacher,
        dense_partner=dense_partner,
        dense_first=dense_first,
        tokens=tokens,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        learning_rate=learning_rate,
        validation_tokens=validation_tokens,
        validations=validations,
        patience=patience,
        precision=precision,
        seed=seed,
    )
    texts = parse_texts(domain)
    check_output(output, overwrite, "pathways.json")
    check_domains(folder, texts)
    sources = calibration_texts(texts, held_out, seed, tokens)
    model, tokenizer = load_sparse(folder, dtype)
    from hf_sparse_pathways.healing.healing import heal

    job = ("heal", folder, dtype, output.absolute(), texts, held_out, settings)
    with unfinished_work(*job) as work:
        healed = heal(model, tokenizer, sources, settings=settings, work_folder=work)
        write_checkpoint(output, model, tokenizer, healed.pathways, healed.adapters)
    for table in healed.sections():
        print_table(table.title, table.header, table.rows)
    typer.echo(f"{healed.pathways} -> {output}")
    if healed.adapters:
        typer.echo(_describe_adapters(output, list(healed.adapters)))


def _describe_adapters(output: Path, domains: Sequence[str]) -> str:
    """Say where adapters lie, and how one is used: by itself the model does not put it on."""
    folders = {name: str(output / ADAPTERS / name) for name in domains}
    name, folder = next(iter(folders.items()))
    return "\n".join(
        [
            "adapters, which the model does not put on by itself:",
            *(f"  {folder}" for folder in folders.values()),
            f"to use one with the model of {output}:",
            "  from peft import PeftModel",
            f"  adapted = PeftModel.from_pretrained(model, {folder!r})",
            f"and name its domain: adapted.generate(**inputs, domain={name!r})",
        ]
    )
