"""Long passes over text that can be interrupted: their sums on disk, and where they stood.

A pass is a domain's text through one group of FFN blocks. Its sums are stored about once a minute
and when it is done. Results lie in a folder named by a digest of everything that decides them, so
that other settings never pick them up.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_sparse_pathways.discovery.collectors import Collector
from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.tensor_files import check_header, open_tensors, without_memory

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
            with open_tensors(self.path) as file:
                size = max(self.d_ff + 1, *file.header["upper"].shape[:1])  # or with d_in
                expected = without_memory(torch.float32, size, size)
                check_header({"upper": file.header["upper"]}, {"upper": expected})
                upper = file.read(["upper"])["upper"]
        except (ArtefactError, KeyError) as error:
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

    def resume(self, name: str, collectors: Sequence[Collector]) -> int:
        """Give collectors the sums that an earlier run stored; return how many batches are done.

        A run that was stopped while it stored leaves blocks that disagree: they begin anew.

        Raises:
            ArtefactError: What is stored is damaged, or of other blocks.
        """
        done = self.stored(name, collectors)
        for index, collector in enumerate(collectors if done else ()):
            path = self._path(name, index)
            if path is not None:
                with open_tensors(path) as file:
                    collector.restore(file.read(file.header), done)
        return done

    def stored(self, name: str, collectors: Sequence[Collector]) -> int:
        """Return how many batches of a pass are in the sums that are stored.

        Raises:
            ArtefactError: What is stored is damaged, or of other blocks.
        """
        pairs = ((self._path(name, index), one) for index, one in enumerate(collectors))
        found = {_batches(path, collector) for path, collector in pairs}
        return 0 if len(found) != 1 else found.pop() or 0

    def delete(self, name: str, blocks: int) -> None:
        """Delete the stored sums of a pass."""
        for index in range(blocks):
            path = self._path(name, index)
            if path is not None:
                path.unlink(missing_ok=True)

    def store(self, name: str, collectors: Sequence[Collector], done: int) -> None:
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

    def store_sometimes(self, name: str, collectors: Sequence[Collector], done: int) -> None:
        """Store the sums if the last time was a while ago."""
        if time.monotonic() - self._stored > STORE_SECONDS:
            self.store(name, collectors, done)

    def stored_gram(self, name: str, index: int, d_ff: int) -> StoredGram | None:
        """Return a finished pass's Gram matrix as it lies on disk; None without a folder."""
        path = self._path(name, index)
        return None if path is None else StoredGram(path, d_ff)

    def _path(self, name: str, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}-{index}.safetensors"


def _batches(path: Path | None, collector: Collector) -> int | None:
    """Return how many batches a stored block has seen; None if nothing is stored.

    Raises:
        ArtefactError: It is damaged, or is not what a collector of this block stores.
    """
    if path is None or not path.is_file():
        return None
    try:
        with open_tensors(path) as file:
            check_header(file.header, collector.state())
            batches = file.metadata.get("batches", "")
    except ArtefactError as error:
        raise ArtefactError(f"{path} is damaged ({error}). Delete it to begin anew.") from error
    if not re.fullmatch("[0-9]{1,9}", batches):
        raise ArtefactError(f"{path} is damaged (batches). Delete it to begin anew.")
    return int(batches)
