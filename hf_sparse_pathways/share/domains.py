"""Changing single domains of a Hub repository.

Adding one uploads that domain and a small description: neither weights nor other domains. Whoever
else pushes in the meantime is noticed, and the change is made again on top of theirs.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_sparse_pathways.errors import ArtefactError, PathwaysError, UnknownNameError
from hf_sparse_pathways.files import as_json, read_json
from hf_sparse_pathways.pathways.apart import FIELD, folder_for, list_apart
from hf_sparse_pathways.pathways.description import base_from_json, check_entries
from hf_sparse_pathways.pathways.names import check_domain_name
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.storage import (
    JSON_NAME,
    TENSORS_NAME,
    read_together,
    write_pathways,
)
from hf_sparse_pathways.share.card import CARD_NAME, change_rows, is_own_card
from hf_sparse_pathways.share.hub import Push, read_text
from hf_sparse_pathways.share.pictures import PICTURE_NAME, draw_pictures
from hf_sparse_pathways.transport import hub_errors

_ATTEMPTS = 8
"""How often a change is made anew because somebody else has pushed in the meantime."""

_OUTDATED = 412


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
        base = base_from_json(repo.meta.get("base", {}))
        base.check_origin(pathways.base, allow_transfer=allow_transfer)
        for name in pathways.domains:
            own = base.with_experts_of(pathways.base)
            repo.add(replace(pathways.subset([name]), base=own, controls={}), name)

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
        self._api = HfApi(token=token)
        self.meta = self._read(JSON_NAME)
        check_entries(self.meta.get("domains"))
        self._places = list_apart(self.meta)
        self.changed: dict[str, bytes | None] = {}
        self._card = read_text(repo_id, CARD_NAME, head, token)

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
            pictures = self._draw(pathways, name, Path(temporary))
            for file in Path(temporary).iterdir():
                self.changed[f"{place}/{file.name}"] = file.read_bytes()
        self._change_card(added=pathways, pictures=pictures)

    def _draw(self, pathways: Pathways, name: str, folder: Path) -> dict[str, str]:
        """Draw a domain that is added for this package's card, or take an earlier picture away."""
        path = f"{self._places[name]}/{PICTURE_NAME}"
        own = self._card is not None and is_own_card(self._card)
        if own and draw_pictures(pathways, {name: ""}, folder):
            return {name: path}
        if self._api.file_exists(self.repo_id, path, revision=self.head):
            self.changed[path] = None
        return {}

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
            check_entries(own.get("domains"))
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
