"""Which commit of a Hub repository a model was loaded from, by what lies in the cache.

Transformers keeps a repository's name in the configuration, and no longer the commit.
"""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers.utils.hub import cached_file

_COMMIT = re.compile(r"[0-9a-f]{40}")


def note_revision(model: Any, name: Any, **hub: Any) -> None:
    """Note on a model that was just loaded from which commit it came, in place.

    Args:
        model: The model.
        name: What it was loaded from; nothing is noted of a folder, or of None.
        hub: As given to ``from_pretrained``.
    """
    if name is None or os.path.isdir(name):
        return
    try:
        found = cached_file(str(name), "config.json", **{**hub, "local_files_only": True})
    except (OSError, ValueError):
        return
    if commit := commit_of(Path(str(found))):
        model.config._commit_hash = commit


def commit_of(file: Path) -> str | None:
    """Return the commit that a file in the cache belongs to; None of a file elsewhere."""
    commits = [part for part in file.parts if _COMMIT.fullmatch(part)]
    return commits[-1] if commits else None


def find_revision(config: Any) -> str | None:
    """Return the commit of a model's configuration.

    It is the one that was noted, or the only one that is in the cache: of several nobody knows
    which one was loaded.
    """
    noted = getattr(config, "_commit_hash", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if noted is not None or not name or os.path.isdir(name):
        return noted
    try:
        folder = repo_folder_name(repo_id=name, repo_type="model")
    except ValueError:  # it is no repository's name
        return None
    commits = [path.name for path in Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*")]
    return commits[0] if len(commits) == 1 and _COMMIT.fullmatch(commits[0]) else None
