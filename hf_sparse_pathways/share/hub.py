"""The way to the Hub: who pushes what how, and what goes wrong on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


@dataclass(frozen=True, kw_only=True)
class Push:
    """How something is pushed; all as in ``huggingface_hub``.

    Attributes:
        token: Of the account; by default that of ``hf auth login``.
        private: Whether a repository that is created now is private.
        revision: The branch; it is created if needed.
        create_pr: Open a pull request instead of changing the branch.
        commit_message: Title of the commit.
        commit_description: The rest of its message.
    """

    token: str | bool | None = None
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None

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
    """Return a repository's text file, or None if it has none of that name."""
    try:
        file = hf_hub_download(repo_id, path, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8", errors="replace")
