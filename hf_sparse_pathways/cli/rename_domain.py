"""``sparse-pathways rename-domain``: rename a domain of a Hub repository."""

from typing import Annotated

import typer

from hf_sparse_pathways.cli import options as opt


def run(
    repo: opt.Repo,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Its name.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its name from now on.")],
    revision: opt.Revision = None,
    create_pr: opt.CreatePr = False,
    message: opt.Message = None,
) -> None:
    """Rename a domain of a repository; nothing but descriptions is uploaded."""
    from hf_sparse_pathways.share.domains import rename_domain

    push = {"revision": revision, "create_pr": create_pr, "commit_message": message}
    typer.echo(rename_domain(old, new, repo, **push))
