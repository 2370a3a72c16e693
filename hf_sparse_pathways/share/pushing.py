"""Pushing pathways to a Hub repository, with the weights or alone, and with a card.

In a repository every domain lies in a folder of its own (``pathways/apart``).
"""

import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import read_json
from hf_sparse_pathways.pathways.apart import PARENT, list_apart
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.storage import JSON_NAME, TENSORS_NAME, write_pathways
from hf_sparse_pathways.share.card import CARD_NAME, CardSettings, is_own_card, render_card
from hf_sparse_pathways.share.hub import Push, hub_errors, read_text
from hf_sparse_pathways.share.pictures import draw_pictures


def push_folder(
    folder: str | PathLike[str],
    repo_id: str,
    card: CardSettings | None = None,
    **push: Any,
) -> str:
    """Upload a folder with pathways: the weights beside them, if there are any, and all else.

    Hidden files stay behind. Pathways that the repository has are replaced. A card is written,
    unless there is one that somebody else has written.

    Args:
        folder: As written by ``save_pretrained`` or ``sparse-pathways build``.
        repo_id: Such as ``"me/smollm2-pathways"``.
        card: What the card says beside what the pathways say of themselves.
        push: As in ``Push``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ArtefactError: There is no folder, or it has no pathways, or they are damaged.
        HubError: The Hub refuses.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArtefactError(
            f"There is no folder {str(folder)!r} to push with its weights. To copy what is in a "
            "repository, push its pathways alone (--pathways-only, Pathways.push_to_hub) or single "
            "domains (--domain, sp.add_domains)."
        )
    pathways, others = Pathways.from_pretrained(root), _list_files(root)
    return _push(pathways, others, repo_id, card or CardSettings(), Push(**push))


def push_pathways(
    pathways: Pathways,
    repo_id: str,
    card: CardSettings | None = None,
    **push: Any,
) -> str:
    """Upload pathways in place of those in a repository; its other files stay.

    Args:
        pathways: What is pushed.
        repo_id: Such as ``"me/smollm2-code-law"``.
        card: As in ``push_folder``.
        push: As in ``Push``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: The Hub refuses.
    """
    return _push(pathways, {}, repo_id, card or CardSettings(), Push(**push))


def _push(
    pathways: Pathways,
    others: Mapping[str, Path],
    repo_id: str,
    card: CardSettings,
    push: Push,
) -> str:
    api = HfApi(token=push.token)
    with tempfile.TemporaryDirectory() as name:
        write_pathways(pathways, Path(name), apart=True)
        with hub_errors():
            repo_id = api.create_repo(repo_id, private=push.private, exist_ok=True).repo_id
            if push.revision is not None and not push.revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=push.revision, exist_ok=True)
            present = api.list_repo_files(repo_id, revision=push.revision)
            written: dict[str, bytes] = {}
            if _may_write_card(repo_id, present, others, push):
                weights = any(_is_weights(path) for path in (*others, *present))
                places = list_apart(read_json(Path(name, JSON_NAME)))
                pictures = draw_pictures(pathways, places, Path(name))
                text = render_card(pathways, repo_id, card, weights=weights, pictures=pictures)
                written = {CARD_NAME: text.encode()}
            own = _list_files(Path(name), of_pathways=True)
            files: dict[str, Path | bytes] = {**others, **own, **written}
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
    return is_own_card(read_text(repo_id, CARD_NAME, push.revision, push.token) or "")


def _is_of_pathways(path: str) -> bool:
    return path in (JSON_NAME, TENSORS_NAME) or path.startswith(f"{PARENT}/")


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
