"""``sparse-pathways remove-domain``: remove domains from a Hub repository."""

from typing import Annotated

import typer

from hf_sparse_pathways.cli import options as opt


def run(
    repo: opt.Repo,
    domains: Annotated[list[str], typer.Argument(metavar="DOMAIN...", help="What is removed.")],
    revision: opt.Revision = None,
    create_pr: opt.CreatePr = False,
    message: opt.Message = None,
) -> None:
    """Remove domains from a repository; its weights and other domains stay as they are."""
    from hf_sparse_pathways.share.domains import remove_domains

    push = {"revision": revision, "create_pr": create_pr, "commit_message": message}
    typer.echo(remove_domains(domains, repo, **push))
