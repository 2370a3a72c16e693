"""Domains that lie in folders of their own, so that adding one rewrites no other.

``pathways.json`` lists them; ``pathways/<folder>/`` then holds a pair of files of the same kind
with that domain alone. This is how pathways lie in a Hub repository; a local save puts all of them
into one pair.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from hf_sparse_pathways.errors import ArtefactError, PathwaysError
from hf_sparse_pathways.limits import MOST_DOMAINS
from hf_sparse_pathways.pathways.names import check_domain_name

FIELD = "apart"
PARENT = "pathways"
"""Folder of the folders."""

_FOLDER = re.compile(r"[a-z0-9_-]{0,40}-[0-9a-f]{8}")


def folder_for(domain: str, *, taken: Collection[str] = ()) -> str:
    """Return the folder for a domain: readable, and safe on every file system.

    Args:
        domain: The domain.
        taken: Folders of others; one that was renamed stays where it is.
    """
    readable, digest = re.sub(r"[^a-z0-9_-]+", "-", domain.lower())[:40], domain
    while True:
        digest = hashlib.sha256(digest.encode()).hexdigest()
        place = f"{PARENT}/{readable}-{digest[:8]}"
        if place not in taken:
            return place


def list_apart(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return domain -> folder, in order, from a description.

    Raises:
        ArtefactError: It lists something else, or a folder outside of its own.
    """
    entries = meta.get(FIELD, {})
    if not isinstance(entries, dict):
        raise ArtefactError(f"The list of domains apart is a {type(entries).__name__}.")
    if len(entries) > MOST_DOMAINS:
        raise ArtefactError(f"{len(entries)} domains lie apart; at most {MOST_DOMAINS} may.")
    for name, folder in entries.items():
        try:
            check_domain_name(name)
        except PathwaysError as error:
            raise ArtefactError(str(error)) from error
        inside = isinstance(folder, str) and folder.startswith(f"{PARENT}/")
        if not inside or not _FOLDER.fullmatch(folder.removeprefix(f"{PARENT}/")):
            raise ArtefactError(f"Domain {name!r} cannot lie in {folder!r}.")
    if len({*entries.values()}) < len(entries):
        raise ArtefactError("Two domains lie in one folder.")
    return dict(entries)
