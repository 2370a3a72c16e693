"""Pushing to a Hub repository: pathways, with the weights or alone, and plain checkpoints.

In a repository every domain lies in a folder of its own (``pathways/apart``).
"""

import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_sparse_pathways.errors import ArtefactError, PathwaysError
from hf_sparse_pathways.files import read_json
from hf_sparse_pathways.limits import MOST_JSON_BYTES, MOST_TEXT_BYTES
from hf_sparse_pathways.pathways.apart import PARENT, list_apart
from hf_sparse_pathways.pathways.entry import CONFIG_NAME, adapter_files, has_layers, is_adapter
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.storage import JSON_NAME, TENSORS_NAME, write_pathways
from hf_sparse_pathways.reading import read_bytes
from hf_sparse_pathways.share.card import CARD_NAME, CardSettings, is_own_card, render_card
from hf_sparse_pathways.share.hub import Push, read_text
from hf_sparse_pathways.share.layers_card import render_layers_card
from hf_sparse_pathways.share.pictures import draw_pictures
from hf_sparse_pathways.transport import hub_errors


def push_folder(
    folder: str | PathLike[str],
    repo_id: str,
    card: CardSettings | None = None,
    **push: Any,
) -> str:
    """Upload a folder with pathways: the weights beside them, if there are any, and all else.

    A model with FFN layers of its own has none, and is pushed as it is. Hidden files stay behind.
    Pathways that the repository has are replaced. A card is written, unless there is one that
    somebody else has written.

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
    config = root / CONFIG_NAME
    if config.is_file() and has_layers(read_bytes(config, MOST_JSON_BYTES)):
        text = render_layers_card(read_json(config), repo_id, card or CardSettings())
        return push_checkpoint(root, repo_id, Push(**push), card=text)
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


def push_checkpoint(
    folder: str | PathLike[str], repo_id: str, push: Push, card: str | None = None
) -> str:
    """Upload a checkpoint without pathways; weights that are there beside it are deleted.

    Args:
        folder: As written by ``sp.export``, or by a model with FFN layers of its own.
        repo_id: Such as ``"me/smollm2-code"``; it is created if needed.
        push: How.
        card: What the card says, unless somebody else has written one; by default the folder's.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PathwaysError: The repository has pathways, whose base's weights these are not.
        HubError: The Hub refuses.
    """
    files: dict[str, Path | bytes] = {**_list_files(Path(folder))}
    with hub_errors():
        repo_id, present = _open_repo(repo_id, push)
        if card is not None and CARD_NAME not in files:
            files[CARD_NAME] = card.encode()
        if any(_is_of_pathways(path) for path in present):
            raise PathwaysError(
                f"{repo_id} has pathways, and this checkpoint is not their base. Push it to a "
                "repository of its own."
            )
        if CARD_NAME in present and not _is_own(repo_id, push):
            files.pop(CARD_NAME, None)
        gone = [path for path in present if _is_weights(path) and path not in files]
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        title = "Upload model"
        return push.commit(repo_id, title, [*operations, *map(CommitOperationDelete, gone)])


def _open_repo(repo_id: str, push: Push) -> tuple[str, list[str]]:
    """Create a repository and a branch where they are not there; return its full name and files."""
    api = HfApi(token=push.token)
    repo_id = api.create_repo(repo_id, private=push.private, exist_ok=True).repo_id
    if push.revision is not None and not push.revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=push.revision, exist_ok=True)
    return repo_id, list(api.list_repo_files(repo_id, revision=push.revision))


def _push(
    pathways: Pathways,
    others: Mapping[str, Path],
    repo_id: str,
    card: CardSettings,
    push: Push,
) -> str:
    with tempfile.TemporaryDirectory() as name:
        write_pathways(pathways, Path(name), apart=True)
        with hub_errors():
            repo_id, present = _open_repo(repo_id, push)
            written: dict[str, bytes] = {}
            others = _without_adapter_config(others, repo_id, present, push)
            if CONFIG_NAME not in others and _may_write_config(repo_id, present, push):
                written |= adapter_files(pathways.base)
            if _may_write_card(repo_id, present, others, push):
                weights = any(_is_weights(path) for path in (*others, *present))
                places = list_apart(read_json(Path(name, JSON_NAME)))
                pictures = draw_pictures(pathways, places, Path(name))
                text = render_card(pathways, repo_id, card, weights=weights, pictures=pictures)
                written[CARD_NAME] = text.encode()
            own = _list_files(Path(name), of_pathways=True)
            files: dict[str, Path | bytes] = {**others, **own, **written}
            gone = [path for path in present if _is_of_pathways(path) and path not in files]
            operations = [CommitOperationAdd(path, file) for path, file in files.items()]
            title = "Upload model and pathways" if others else "Upload pathways"
            return push.commit(repo_id, title, [*operations, *map(CommitOperationDelete, gone)])


def _without_adapter_config(
    others: Mapping[str, Path], repo_id: str, present: list[str], push: Push
) -> Mapping[str, Path]:
    """Leave out a configuration that stands for a base's where the repository has weights' own."""
    own = others.get(CONFIG_NAME)
    if own is None or not is_adapter(read_bytes(own, MOST_JSON_BYTES)):
        return others
    if _may_write_config(repo_id, present, push):
        return others
    return {path: file for path, file in others.items() if path != CONFIG_NAME}


def _may_write_config(repo_id: str, present: list[str], push: Push) -> bool:
    """Whether no configuration of a model with weights is there."""
    if CONFIG_NAME not in present:
        return True
    config = read_text(repo_id, CONFIG_NAME, push.revision, push.token) or ""
    return is_adapter(config.encode())


def _may_write_card(
    repo_id: str, present: list[str], others: Mapping[str, Path], push: Push
) -> bool:
    """Whether no card is there, or one that this package wrote."""
    if CARD_NAME in others:
        text = read_bytes(others[CARD_NAME], MOST_TEXT_BYTES)
        return is_own_card(text.decode(errors="replace"))
    return CARD_NAME not in present or _is_own(repo_id, push)


def _is_own(repo_id: str, push: Push) -> bool:
    """Whether the card in a repository is one that this package wrote."""
    return is_own_card(read_text(repo_id, CARD_NAME, push.revision, push.token) or "")


def _is_of_pathways(path: str) -> bool:
    return path in (JSON_NAME, TENSORS_NAME) or path.startswith(f"{PARENT}/")


def _is_weights(path: str) -> bool:
    own = path.endswith((".safetensors", ".bin")) and "/" not in path
    return own and not _is_of_pathways(path)


def _list_files(root: Path, *, of_pathways: bool = False) -> dict[str, Path]:
    """Return path in the repository -> file, hidden ones left out.

    Raises:
        ArtefactError: A link leads to a file elsewhere, which nobody may have meant to publish.
    """
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
    listed = {
        path: file
        for path, file in sorted(files.items())
        if _is_of_pathways(path) == of_pathways and not path.startswith(".") and "/." not in path
    }
    own = [root.resolve(), *_blobs(root)]
    for path, file in listed.items():
        if not any(file.resolve().is_relative_to(folder) for folder in own):
            raise ArtefactError(
                f"{path} in {root} is a link to a file outside of the folder. Put a copy there to "
                "push it, or delete the link."
            )
    return listed


def _blobs(root: Path) -> list[Path]:
    """Return where the files of a snapshot in the Hub's cache lie, to which it has links."""
    folder = root.resolve()
    return [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
