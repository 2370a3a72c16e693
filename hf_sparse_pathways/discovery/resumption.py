"""Long passes over text that can be interrupted: their sums on disk, and where they stood.

A pass is a domain's text through one group of FFN blocks. Its sums are stored about once a minute
and when it is done. Results lie in a folder named by a digest of everything that decides them, so
that other settings never pick them up.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hf_sparse_pathways.discovery.collectors import BlockCollector
from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.errors import ArtefactError

STORE_SECONDS = 60.0
"""How often unfinished work is stored."""


def digest_plan(plan: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits that identify everything that decides a result."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StoredGram:
    """The Gram matrix of a finished pass, on disk."""

    path: Path
    d_ff: int

    def load(self) -> Gram:
        """Read the matrix.

        Raises:
            ArtefactError: The work folder is gone.
        """
        try:
            with safe_open(self.path, "pt") as file:
                upper = file.get_tensor("upper")
        except (OSError, SafetensorError) as error:
            raise ArtefactError(
                f"{self.path} cannot be read ({error}). Keep the work folder while its profile is "
                "in use, or save the profile first."
            ) from error
        return Gram.of_upper(upper, self.d_ff)


class Resumption:
    """Where the passes of one plan are stored; nothing is, without a folder.

    Args:
        folder: The user's folder for work in progress, or None.
        plan: Everything that decides the result, as JSON values.
    """

    def __init__(self, folder: "str | os.PathLike[str] | None", plan: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder, f"pass-{digest_plan(plan)}")
        self._stored = time.monotonic()

    def resume(self, name: str, collectors: Sequence[BlockCollector]) -> int:
        """Give collectors the sums that an earlier run stored; return how many batches are done.

        A run that was stopped while it stored leaves blocks that disagree: they begin anew.
        """
        done = self.stored(name, len(collectors))
        for index, collector in enumerate(collectors if done else ()):
            path = self._path(name, index)
            if path is not None:
                collector.restore(load_file(path), done)
        return done

    def stored(self, name: str, blocks: int) -> int:
        """Return how many batches of a pass are in the sums that are stored."""
        found = {_batches(self._path(name, index)) for index in range(blocks)}
        return 0 if len(found) != 1 else found.pop() or 0

    def delete(self, name: str, blocks: int) -> None:
        """Delete the stored sums of a pass."""
        for index in range(blocks):
            path = self._path(name, index)
            if path is not None:
                path.unlink(missing_ok=True)

    def store(self, name: str, collectors: Sequence[BlockCollector], done: int) -> None:
        """Store the sums of a pass, block by block, each whole or not at all."""
        written: list[Path] = []
        for index, collector in enumerate(collectors):
            path = self._path(name, index)
            if path is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {key: tensor.contiguous() for key, tensor in collector.state().items()}
            save_file(tensors, path.with_suffix(".partial"), metadata={"batches": str(done)})
            written.append(path)
        for path in written:
            os.replace(path.with_suffix(".partial"), path)
        self._stored = time.monotonic()

    def store_sometimes(self, name: str, collectors: Sequence[BlockCollector], done: int) -> None:
        """Store the sums if the last time was a while ago."""
        if time.monotonic() - self._stored > STORE_SECONDS:
            self.store(name, collectors, done)

    def stored_gram(self, name: str, index: int, d_ff: int) -> StoredGram | None:
        """Return a finished pass's Gram matrix as it lies on disk; None without a folder."""
        path = self._path(name, index)
        return None if path is None else StoredGram(path, d_ff)

    def _path(self, name: str, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}-{index}.safetensors"


def _batches(path: Path | None) -> int | None:
    """Return how many batches a stored block has seen; None if nothing is stored."""
    if path is None or not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return int(file.metadata()["batches"])
