"""``sparse-pathways push``: upload a folder, its pathways alone, or single domains."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt


def run(  # noqa: PLR0913
    ctx: typer.Context,
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder or Hub id with pathways.")
    ],
    repo: opt.Repo,
    domain: Annotated[
        list[str],
        typer.Option("--domain", help="Add this domain, and upload nothing else; repeat."),
    ] = [],  # noqa: B006
    pathways_only: Annotated[
        bool, typer.Option("--pathways-only", help="Leave the weights behind.")
    ] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For the card: report.json of `evaluate --report`."),
    ] = None,
    license: opt.License = None,
    private: opt.Private = None,
    revision: opt.Revision = None,
    create_pr: opt.CreatePr = False,
    message: opt.Message = None,
) -> None:
    """Push weights and pathways to the Hub, pathways alone, or add domains to those there.

    The account is that of `hf auth login`, or of HF_TOKEN.
    """
    from hf_sparse_pathways.files import read_json
    from hf_sparse_pathways.measure.quality_report import QualityReport
    from hf_sparse_pathways.pathways.pathway import Pathways
    from hf_sparse_pathways.share.card import CardSettings
    from hf_sparse_pathways.share.domains import add_domains
    from hf_sparse_pathways.share.pushing import push_folder, push_pathways

    push: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": message,
    }
    measured = None if evaluation is None else QualityReport.from_dict(read_json(evaluation))
    card = CardSettings(evaluation=measured, license=license)
    if domain:
        opt.refuse_beside(ctx, "--domain", ("evaluation", "license", "private", "pathways_only"))
        address = add_domains(Pathways.from_pretrained(folder).subset(domain), repo, **push)
    elif pathways_only:
        address = push_pathways(Pathways.from_pretrained(folder), repo, card, **push)
    else:
        address = push_folder(folder, repo, card, **push)
    typer.echo(address)
