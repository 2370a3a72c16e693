"""Pushing pathways to a Hub repository, and changing single domains of one.

In a repository every domain lies in a folder of its own (``pathways/apart``), so that adding one
uploads that domain and a small description: neither weights nor other domains. Whoever else pushes
in the meantime is noticed, and the change is made again on top of theirs.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_sparse_pathways.errors import ArtefactError, HubError, PathwaysError, UnknownNameError
from hf_sparse_pathways.files import as_json, read_json
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.pathways.apart import FIELD, PARENT, folder_for, list_apart
from hf_sparse_pathways.pathways.pathway import Pathways, check_domain_name
from hf_sparse_pathways.pathways.storage import (
    JSON_NAME,
    TENSORS_NAME,
    base_from_json,
    check_entries,
    read_together,
    write_pathways,
)
from hf_sparse_pathways.share.card import CARD_NAME, change_rows, is_own_card, render_card

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
        raise HubError(" ".join(lines) or type(error).__name__) from error


_ATTEMPTS = 8
"""How often a change is made anew because somebody else has pushed in the meantime."""

_OUTDATED = 412


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


def _is_of_pathways(path: str) -> bool:
    return path in (JSON_NAME, TENSORS_NAME) or path.startswith(f"{PARENT}/")


def push_folder(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    evaluation: QualityReport | None = None,
    license: str | None = None,
    **push: Any,
) -> str:
    """Upload a folder with pathways: the weights beside them, if there are any, and all else.

    Hidden files stay behind. Pathways that the repository has are replaced. A card is written,
    unless there is one that somebody else has written.

    Args:
        folder: As written by ``save_pretrained`` or ``sparse-pathways build``.
        repo_id: Such as ``"me/smollm2-pathways"``.
        evaluation: What ``evaluate`` has measured, for the card.
        license: Of the weights, for the card; as the Hub calls it.
        push: As in ``Push``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ArtefactError: The folder has no pathways, or they are damaged.
        HubError: The Hub refuses.
    """
    root = Path(folder)
    pathways, others = Pathways.from_pretrained(root), _list_files(root)
    return _push(pathways, others, repo_id, evaluation, license, Push(**push))


def push_pathways(
    pathways: Pathways,
    repo_id: str,
    *,
    evaluation: QualityReport | None = None,
    license: str | None = None,
    **push: Any,
) -> str:
    """Upload pathways in place of those in a repository; its other files stay.

    Args:
        pathways: What is pushed.
        repo_id: Such as ``"me/smollm2-code-law"``.
        evaluation: As in ``push_folder``.
        license: As in ``push_folder``.
        push: As in ``Push``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: The Hub refuses.
    """
    return _push(pathways, {}, repo_id, evaluation, license, Push(**push))


def _push(
    pathways: Pathways,
    others: Mapping[str, Path],
    repo_id: str,
    evaluation: QualityReport | None,
    license: str | None,
    push: Push,
) -> str:
    api = HfApi(token=push.token)
    with tempfile.TemporaryDirectory() as name, hub_errors():
        write_pathways(pathways, Path(name), apart=True)
        repo_id = api.create_repo(repo_id, private=push.private, exist_ok=True).repo_id
        if push.revision is not None and not push.revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=push.revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=push.revision)
        files: dict[str, Path | bytes] = {**others, **_list_files(Path(name), of_pathways=True)}
        if _may_write_card(repo_id, present, others, push):
            weights = any(_is_weights(path) for path in (*others, *present))
            card = render_card(
                pathways, repo_id, weights=weights, evaluation=evaluation, license=license
            )
            files[CARD_NAME] = card.encode()
        gone = [path for path in present if _is_of_pathways(path) and path not in files]
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        title = "Upload model and pathways" if others else "Upload pathways"
        return push.commit(repo_id, title, [*operations, *map(CommitOperationDelete, gone)])


def _may_write_card(
    repo_id: str, present: list[str], others: Mapping[str, Path], push: Push
) -> bool:
    """Whether no card is there, or one that this package wrote."""
    if CARD_NAME in others:
        return is_own_card(others[CARD_NAME].read_text(encoding="utf-8", errors="replace"))
    if CARD_NAME not in present:
        return True
    return is_own_card(_read_text(repo_id, CARD_NAME, push.revision, push.token) or "")


def _read_text(
    repo_id: str, path: str, revision: str | None, token: str | bool | None
) -> str | None:
    """Return a repository's text file, or None if it has none of that name."""
    try:
        file = hf_hub_download(repo_id, path, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8", errors="replace")


def _is_weights(path: str) -> bool:
    own = path.endswith((".safetensors", ".bin")) and "/" not in path
    return own and not _is_of_pathways(path)


def _list_files(root: Path, *, of_pathways: bool = False) -> dict[str, Path]:
    """Return path in the repository -> file, hidden ones left out."""
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
    return {
        path: file
        for path, file in sorted(files.items())
        if _is_of_pathways(path) == of_pathways and not path.startswith(".") and "/." not in path
    }


def add_domains(
    pathways: Pathways, repo_id: str, *, allow_transfer: bool = False, **push: Any
) -> str:
    """Add domains to a repository, or replace those of the same names; upload nothing else.

    Args:
        pathways: What is added; controls are left out.
        repo_id: A repository with pathways.
        allow_transfer: Whether pathways of another model or revision with the same FFN blocks
            will do.
        push: As in ``Push``.

    Raises:
        ArtefactError: The repository has no pathways.
        MismatchError: Its pathways were made for another base.
        HubError: The Hub refuses.
    """

    def change(repo: _Repo) -> None:
        base = base_from_json(repo.meta["base"])
        base.check_origin(pathways.base, allow_transfer=allow_transfer)
        for name in pathways.domains:
            repo.add(replace(pathways.subset([name]), base=base, controls={}), name)

    return _change(repo_id, Push(**push), change, f"Add {', '.join(pathways.domains)}")


def remove_domains(domains: Iterable[str], repo_id: str, **push: Any) -> str:
    """Remove domains from a repository.

    Args:
        domains: Their names.
        repo_id: A repository with pathways.
        push: As in ``Push``.

    Raises:
        UnknownNameError: It has no such domain.
        ArtefactError: The repository has no pathways.
        HubError: The Hub refuses.
    """
    names = list(dict.fromkeys(domains))

    def change(repo: _Repo) -> None:
        for name in names:
            repo.remove(name)

    return _change(repo_id, Push(**push), change, f"Remove {', '.join(names)}")


def rename_domain(old: str, new: str, repo_id: str, **push: Any) -> str:
    """Rename a domain in a repository; nothing but descriptions is uploaded.

    Args:
        old: Its name.
        new: Its name from now on.
        repo_id: A repository with pathways.
        push: As in ``Push``.

    Raises:
        UnknownNameError: It has no such domain.
        PathwaysError: The new name cannot be a domain's, or there is one.
        ArtefactError: The repository has no pathways.
        HubError: The Hub refuses.
    """
    check_domain_name(new)
    return _change(
        repo_id, Push(**push), lambda repo: repo.rename(old, new), f"Rename {old} to {new}"
    )


class _Repo:
    """The descriptions of a repository's pathways at one commit, and the changes to be made.

    Attributes:
        head: The commit.
        meta: The description, as it is going to be.
        changed: Path -> content, or None where a file or folder is deleted.
    """

    def __init__(self, repo_id: str, head: str, token: str | bool | None) -> None:
        self.repo_id, self.head, self._token = repo_id, head, token
        self.meta = self._read(JSON_NAME)
        check_entries(self.meta.get("domains"))
        self._places = list_apart(self.meta)
        self.changed: dict[str, bytes | None] = {}
        self._card = _read_text(repo_id, CARD_NAME, head, token)

    def _read(self, path: str) -> dict[str, Any]:
        try:
            file = hf_hub_download(self.repo_id, path, revision=self.head, token=self._token)
        except EntryNotFoundError as error:
            raise ArtefactError(
                f"{self.repo_id} has no {path}. Push pathways to it first: "
                "pathways.push_to_hub(...), or `sparse-pathways push`."
            ) from error
        return read_json(Path(file))

    @property
    def _together(self) -> list[str]:
        """Names of the domains that lie in one pair of files."""
        return [entry["name"] for entry in self.meta["domains"]]

    def _check_known(self, name: str) -> None:
        names = [*self._together, *self._places]
        if name not in names:
            raise UnknownNameError("domain", name, names)

    def add(self, pathways: Pathways, name: str) -> None:
        """Put one domain into a folder, in place of one of its name."""
        if name in self._together:
            self.remove(name)
        place = self._places.get(name) or folder_for(name, taken=self._places.values())
        self._places[name] = place
        with tempfile.TemporaryDirectory() as temporary:
            write_pathways(pathways, Path(temporary))
            for file in (JSON_NAME, TENSORS_NAME):
                self.changed[f"{place}/{file}"] = Path(temporary, file).read_bytes()
        self._change_card(added=pathways)

    def remove(self, name: str) -> None:
        """Delete one domain's folder; one that shares files with others is taken out of them."""
        self._check_known(name)
        self._change_card(gone=name)
        if name in self._places:
            self.changed[f"{self._places.pop(name)}/"] = None
            return
        others = [other for other in self._together if other != name]
        together = read_together(self.repo_id, revision=self.head, token=self._token)
        with tempfile.TemporaryDirectory() as temporary:
            write_pathways(together.subset(others), Path(temporary))
            self.meta = read_json(Path(temporary, JSON_NAME))
            self.changed[TENSORS_NAME] = Path(temporary, TENSORS_NAME).read_bytes()

    def rename(self, old: str, new: str) -> None:
        """Give a domain another name, where it lies."""
        self._check_known(old)
        if new in (*self._together, *self._places):
            raise PathwaysError(f"{self.repo_id} has a domain {new!r} already.")
        self._change_card(renamed=(old, new))
        if old in self._places:
            path = f"{self._places[old]}/{JSON_NAME}"
            own = self._read(path)
            _rename(own, old, new)
            self.changed[path] = as_json(own)
            self._places = {new if n == old else n: place for n, place in self._places.items()}
        else:
            _rename(self.meta, old, new)

    def _change_card(self, **change: Any) -> None:
        """Change the rows of domains in the card, if it is this package's."""
        if self._card is not None and (card := change_rows(self._card, **change)) != self._card:
            self._card, self.changed[CARD_NAME] = card, card.encode()

    def operations(self) -> list[Any]:
        """Return what a commit does."""
        meta = {name: value for name, value in self.meta.items() if name != FIELD}
        meta |= {FIELD: self._places} if self._places else {}
        changed = {**self.changed, JSON_NAME: as_json(meta)}
        return [
            CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
            for path, content in changed.items()
        ]


def _rename(meta: dict[str, Any], old: str, new: str) -> None:
    for entry in meta["domains"]:
        if entry["name"] == old:
            entry["name"] = new


def _change(repo_id: str, push: Push, change: Callable[[_Repo], None], title: str) -> str:
    """Change a repository's pathways in one commit, on top of whatever was pushed before."""
    for attempt in range(1, _ATTEMPTS + 1):
        with hub_errors():
            try:
                return _try_to_change(repo_id, push, change, title)
            except HfHubHTTPError as error:
                if error.response.status_code != _OUTDATED or attempt == _ATTEMPTS:
                    raise
    raise AssertionError  # the last attempt has returned or raised


def _try_to_change(repo_id: str, push: Push, change: Callable[[_Repo], None], title: str) -> str:
    api = HfApi(token=push.token)
    head = str(api.model_info(repo_id, revision=push.revision).sha)
    repo = _Repo(repo_id, head, push.token)
    change(repo)
    return push.commit(repo_id, title, repo.operations(), parent_commit=head)
