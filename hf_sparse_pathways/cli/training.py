"""What the commands that train have in common: domains that are there, and a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.outputs import written_whole

if TYPE_CHECKING:
    from hf_sparse_pathways.pathways.pathway import Pathways

ADAPTERS = "adapters"
"""Folder in a checkpoint that holds the domains' adapters."""


def check_domains(folder: str, texts: opt.Sources) -> None:
    """Refuse an unknown domain before a model is loaded.

    Raises:
        UnknownNameError: One is unknown.
    """
    from hf_sparse_pathways.pathways.pathway import Pathways

    known = Pathways.from_pretrained(folder).domains
    for name in texts:
        if name not in known:
            raise UnknownNameError("domain", name, known)


def write_checkpoint(
    output: Path,
    model: Any,
    tokenizer: Any,
    pathways: "Pathways",
    adapters: Mapping[str, Any] | None = None,
) -> None:
    """Write a model with trained pathways, and adapters if there are any, whole or not at all."""
    model.set_pathways(pathways)
    with written_whole(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, adapter in (adapters or {}).items():
            adapter.save_pretrained(partial / ADAPTERS / name)
