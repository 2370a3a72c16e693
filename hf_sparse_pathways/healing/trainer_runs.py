"""What runs of Transformers' ``Trainer`` have in common here: batches, and where they go on."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hf_sparse_pathways.discovery.windows import Window, make_batches

_STATE = "trainer_state.json"
"""What ``Trainer`` writes last into a checkpoint."""


def collate(windows: Sequence[Window]) -> dict[str, Tensor]:
    """Return windows as one batch: ``ids``, int64 ``(rows, tokens)``, and ``mask``, bool."""
    (batch,) = make_batches(windows, len(windows))
    return {"ids": batch.ids, "mask": batch.mask}


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint of a run that is complete, if there is one."""
    found = [path for path in folder.glob("checkpoint-*") if (path / _STATE).is_file()]
    steps = {int(path.name.rpartition("-")[2]): path for path in found}
    return str(steps[max(steps)]) if steps else None
