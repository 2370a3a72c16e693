"""Text out of ``datasets``: Hub datasets by their address, and what a dataset says of its origin.

An address is streamed at the commit that its revision stands for now, and nothing is kept on disk:
``hf://datasets/OWNER/NAME``, then as needed ``/CONFIG``, ``@REVISION``, ``:SPLIT`` (train) and
``:COLUMN`` (text).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from huggingface_hub import HfApi, constants

from hf_sparse_pathways.errors import PathwaysError, TextError
from hf_sparse_pathways.pathways.revision import commit_of
from hf_sparse_pathways.transport import hub_errors

SCHEME = "hf://"
PREFIX = f"{SCHEME}datasets/"

_ADDRESS = re.compile(
    rf"{PREFIX}(?P<id>[^/@:]+(/[^/@:]+)?)(/(?P<config>[^/@:]+))?(@(?P<revision>[^@:]+))?"
    r"(:(?P<split>[^:\[]+))?(:(?P<column>[^:]+))?"
)

_FILE = re.compile(rf"{PREFIX}(?P<id>[^/@]+/[^/@]+)@(?P<revision>[^/]+)/")
"""How ``datasets`` calls a file of a repository."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """A column of one split of a dataset on the Hub.

    Attributes:
        id: ``OWNER/NAME``.
        config: Its configuration; None for the only or default one.
        revision: Branch, tag or commit; None for the newest.
        split: As ``datasets`` takes it.
        column: What holds the documents; None for ``text``, ``content`` or the only text.
    """

    id: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    column: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address.

        Raises:
            TextError: It is none.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise TextError(
                f"{text!r} is no address of a dataset. Write {PREFIX}OWNER/NAME, and behind it "
                "what is needed of /CONFIG@REVISION:SPLIT:COLUMN."
            )
        return cls(**{name: value for name, value in found.groupdict().items() if value})

    def pinned(self) -> Self:
        """Return the same at the commit that its revision stands for now.

        Raises:
            HubError: The Hub does not have it, or cannot be reached.
        """
        with hub_errors(f"{self} cannot be found"):
            commit = HfApi().dataset_info(self.id, revision=self.revision).sha
        return replace(self, revision=commit)

    def stream(self) -> Iterator[dict[str, Any]]:
        """Yield the rows, which are read as they are asked for.

        Raises:
            TextError: ``datasets`` is not installed, does not know the configuration or split, or
                cannot read the files.
            HubError: The Hub cannot be reached any more.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise TextError(
                f"{self}: this needs datasets. Install it with "
                "`pip install hf-sparse-pathways[data]`."
            ) from error
        place = {"split": self.split, "revision": self.revision}
        try:
            with hub_errors(f"{self} cannot be read"):
                yield from load_dataset(self.id, self.config, **place, streaming=True)
        except PathwaysError:
            raise
        except Exception as error:  # whatever the readers of all kinds of files raise
            told = " ".join(str(error).split()) or type(error).__name__
            raise TextError(f"{self} cannot be read: {told}") from error

    def described(self) -> dict[str, str]:
        """Return what is known, to be saved with what is made of the text."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        column = f":{self.column}" if self.column else ""
        return f"{PREFIX}{self.id}{config}{revision}:{self.split}{column}"


def describe_dataset(source: Any) -> dict[str, str]:
    """Return what a ``datasets`` object knows of its origin; nothing of anything else.

    ``id`` and ``revision`` are there only if its files tell that they are from the Hub.
    """
    info: Any = getattr(source, "info", None)
    if not getattr(info, "dataset_name", None):
        return {}
    known = {
        "name": info.dataset_name,
        "config": getattr(info, "config_name", None),
        "split": getattr(source, "split", None),
        **next(filter(None, map(_origin, map(str, _files(source)))), {}),
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def _origin(file: str) -> dict[str, str]:
    """Return the repository and commit of one of a dataset's files, if it tells.

    A file that ``datasets`` has prepared lies in a folder that is called by the commit, and the
    cache of the Hub knows the repository that has it.
    """
    if found := _FILE.match(file):
        return found.groupdict()
    commit = commit_of(Path(file))
    cached = Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}")
    kept = next(cached, None) if commit else None
    if kept is None:
        return {}
    _, *name = kept.parts[-3].split(constants.REPO_ID_SEPARATOR)
    return {"id": "/".join(name), "revision": kept.name}


def _files(source: Any) -> Iterator[Any]:
    """Yield the files of a ``datasets`` object: those that were downloaded, or are streamed.

    Of a stream only ``datasets``' own attributes tell; without them nothing is known.
    """
    yield from source.info.download_checksums or ()
    yield from (cached["filename"] for cached in getattr(source, "cache_files", ()))
    rows: Any = getattr(source, "_ex_iterable", None)
    while hasattr(rows, "ex_iterable"):  # shuffled, mapped, ...
        rows = rows.ex_iterable
    yield from getattr(rows, "kwargs", {}).get("base_files") or ()
