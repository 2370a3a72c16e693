"""Where a training run stands, on disk: trained tensors, the optimiser's moments, the record.

One safetensors file, written whole or not at all, in a folder named by a digest of everything that
decides the run, so that other settings never pick it up. A run that goes on from it computes what
it would have computed without the interruption, bit for bit.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_sparse_pathways.discovery.resumption import STORE_SECONDS, digest_plan
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.reading import parse_json
from hf_sparse_pathways.tensor_files import check_header, open_tensors

Groups = dict[str, dict[str, Tensor]]
"""Tensors by what they are (``parameters``, ``best``, ...) and by name."""


class Checkpoints:
    """Where one run is stored; nothing is, without a folder.

    Args:
        folder: The user's folder for work in progress, or None.
        plan: Everything that decides the result, as JSON values.
    """

    def __init__(self, folder: "str | os.PathLike[str] | None", plan: Mapping[str, Any]) -> None:
        name = f"run-{digest_plan(plan)}.safetensors"
        self._path = None if folder is None else Path(folder, name)
        self._stored = time.monotonic()

    def load(self, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Any], Groups] | None:
        """Return the record and the tensors that were stored last; None if nothing was.

        Args:
            parameters: What is trained; every group has tensors of these names and shapes.

        Raises:
            ArtefactError: What was stored is damaged, or of other parameters.
        """
        if self._path is None or not self._path.is_file():
            return None
        try:
            with open_tensors(self._path) as file:
                record = parse_json(file.metadata.get("record", ""))
                for named in _grouped(file.header).values():
                    check_header(named, parameters)
                return record, _grouped(file.read(file.header))
        except ValueError as error:
            raise self.damaged(str(error)) from error

    def damaged(self, problem: str) -> ArtefactError:
        """Return the error of a file that no run can go on from."""
        return ArtefactError(f"{self._path} is damaged ({problem}). Delete it to begin anew.")

    def store(self, record: Mapping[str, Any], groups: Groups) -> None:
        """Store a record of JSON values, and tensors."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{group}/{name}": tensor.detach().contiguous()
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        temporary = self._path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"record": json.dumps(record)})
        os.replace(temporary, self._path)
        self._stored = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last time was a while ago."""
        return self._path is not None and time.monotonic() - self._stored >= STORE_SECONDS


def _grouped(tensors: Mapping[str, Tensor]) -> Groups:
    groups: Groups = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = tensor
    return groups
