"""The way to the Hub: who pushes what how, and what goes wrong on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hf_sparse_pathways.errors import HubError
from hf_sparse_pathways.limits import MOST_TEXT_BYTES
from hf_sparse_pathways.reading import read_bytes
from hf_sparse_pathways.tokens import check_token, hide_tokens

_TRANSPORT = ("huggingface_hub", "httpx", "httpx2")
"""Packages whose errors come from the way to the Hub."""


@contextmanager
def hub_errors() -> Iterator[None]:
    """Within the block, what goes wrong on the way to the Hub is one of this package's errors."""
    try:
        yield
    except Exception as error:
        own = type(error).__module__.partition(".")[0]
        if own not in _TRANSPORT and not isinstance(error, OSError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines) or type(error).__name__
        hidden = hide_tokens(told)
        raise HubError(hidden) from (error if hidden == told else None)


@dataclass(frozen=True, kw_only=True)
class Push:
    """How something is pushed; all as in ``huggingface_hub``.

    Attributes:
        token: Of the account; by default that of ``hf auth login``. It is not part of the repr.
        private: Whether a repository that is created now is private.
        revision: The branch; it is created if needed.
        create_pr: Open a pull request instead of changing the branch.
        commit_message: Title of the commit.
        commit_description: The rest of its message.
    """

    token: str | bool | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None

    def __post_init__(self) -> None:
        check_token(self.token)

    def commit(self, repo_id: str, title: str, operations: list[Any], **options: Any) -> str:
        """Make one commit; return its address, or the pull request's."""
        done = HfApi(token=self.token).create_commit(
            repo_id,
            operations,
            commit_message=self.commit_message or title,
            commit_description=self.commit_description,
            revision=self.revision,
            create_pr=self.create_pr,
            **options,
        )
        return done.pr_url or done.commit_url


def read_text(
    repo_id: str, path: str, revision: str | None, token: str | bool | None
) -> str | None:
    """Return a repository's text file, or None if it has none of that name.

    Raises:
        ArtefactError: It is larger than a text may be.
    """
    try:
        file = hf_hub_download(repo_id, path, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return read_bytes(Path(file), MOST_TEXT_BYTES).decode(errors="replace")
