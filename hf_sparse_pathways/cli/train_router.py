"""``sparse-pathways train-router``: train the routers of pathways with groups of neurons."""

from typing import Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse, unfinished_work
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.profile import HELD_OUT, calibration_texts
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.cli.training import check_domains, write_checkpoint
from hf_sparse_pathways.healing.router_settings import RouterSettings
from hf_sparse_pathways.outputs import check_output

USUAL = RouterSettings()


def run(  # noqa: PLR0913
    folder: opt.Folder,
    domain: opt.Texts,
    output: opt.Output,
    tokens: opt.TrainingTokens = USUAL.tokens,
    loss: Annotated[
        str, typer.Option(help="Towards the dense model: kl, lm, hidden, joined by +.")
    ] = USUAL.loss,
    balance: Annotated[
        float, typer.Option(help="Factor of the load-balancing loss.")
    ] = USUAL.balance,
    z_loss: Annotated[
        float, typer.Option(help="Factor of the squared log-sum-exp of the logits.")
    ] = USUAL.z_loss,
    refit: Annotated[
        bool, typer.Option(help="Train the refitted columns of the outgoing leaves, too.")
    ] = USUAL.refit,
    learning_rate: Annotated[
        float, typer.Option(help="Highest rate of the routers.")
    ] = USUAL.learning_rate,
    refit_rate: Annotated[
        float, typer.Option(help="Highest rate of the refitted columns.")
    ] = USUAL.refit_rate,
    batch_size: opt.BatchSize = USUAL.batch_size,
    accumulate: opt.Accumulate = USUAL.accumulate,
    max_length: opt.MaxLength = None,
    validation_tokens: opt.ValidationTokens = USUAL.validation_tokens,
    validations: opt.Validations = USUAL.validations,
    held_out: opt.HeldOut = HELD_OUT,
    seed: opt.Seed = USUAL.seed,
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
) -> None:
    """Train which groups of neurons a token has, and save the model with them.

    For pathways that were built with --mixture. Give the texts, --held-out and --seed that it was
    built with: held-out documents are never trained on. An interrupted run goes on where it stood
    when it is started again with the same options.
    """
    settings = RouterSettings(
        loss=loss,
        balance=balance,
        z_loss=z_loss,
        refit=refit,
        learning_rate=learning_rate,
        refit_rate=refit_rate,
        tokens=tokens,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        validation_tokens=validation_tokens,
        validations=validations,
        seed=seed,
    )
    texts = parse_texts(domain)
    check_output(output, overwrite, "pathways.json")
    check_domains(folder, texts)
    sources = calibration_texts(texts, held_out, seed, tokens)
    model, tokenizer = load_sparse(folder, dtype)
    from hf_sparse_pathways.healing.router_training import train_routers

    job = ("train-router", folder, dtype, output.absolute(), texts, held_out, settings)
    with unfinished_work(*job) as work:
        trained = train_routers(model, tokenizer, sources, settings=settings, work_folder=work)
        write_checkpoint(output, model, tokenizer, trained.pathways)
    for table in trained.sections():
        print_table(table.title, table.header, table.rows)
    typer.echo(f"{trained.pathways} -> {output}")
