"""The way to the Hub: who pushes what how, and what goes wrong on it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hf_sparse_pathways.limits import MOST_TEXT_BYTES
from hf_sparse_pathways.reading import read_bytes
from hf_sparse_pathways.tokens import check_token


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
