"""Models, tokenizers and unfinished work, as the commands need them."""

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.memory import format_memory

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_dense(name: str, dtype: str) -> tuple[Any, Any]:
    """Load a dense causal LM, or that of a model with pathways, and its tokenizer."""
    from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
    from hf_sparse_pathways.modeling.tokenizing import load_tokenizer

    model = load_model(name, dtype)
    if isinstance(model, SparsePathwaysForCausalLM):
        model = model.to_dense()
    return model, load_tokenizer(name)


def load_model(name: str, dtype: str) -> Any:
    """Load a causal LM, dense or with pathways, whichever is there."""
    from transformers import AutoModelForCausalLM

    from hf_sparse_pathways.pathways.revision import note_revision

    _check_dtype(dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    note_revision(model, name)
    return model


def load_sparse(name: str, dtype: str, executor: str | None = None) -> tuple[Any, Any]:
    """Load a model with pathways and its tokenizer."""
    from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
    from hf_sparse_pathways.modeling.tokenizing import load_tokenizer

    _check_dtype(dtype)
    model = SparsePathwaysForCausalLM.from_pretrained(name, dtype=dtype, executor=executor)
    return model.eval(), load_tokenizer(name)


def parse_dtype(name: str) -> Any:
    """Return torch's dtype of a name; ``auto`` is float32, as where nothing was saved.

    Raises:
        UnknownNameError: There is no such dtype.
    """
    import torch

    _check_dtype(name)
    return torch.float32 if name == "auto" else getattr(torch, name)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)


UNFINISHED_DAYS = 7


@contextmanager
def unfinished_work(*job: Any) -> Iterator[Path]:
    """Yield a folder for a job's unfinished work, deleted when the block succeeds.

    After an interruption or error it stays in the Hugging Face cache (``HF_HOME``), so that the
    same job goes on from there, and a note of the error says so; what nobody came back to is
    deleted by the next job after a week.

    Args:
        job: What identifies the job: values whose ``repr`` is the same next time.
    """
    from huggingface_hub import constants

    place = Path(constants.HF_HOME, "sparse_pathways", "unfinished")
    for other in place.glob("*"):
        with suppress(FileNotFoundError):  # another process deletes, too
            if time.time() - other.stat().st_mtime > UNFINISHED_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
    folder = place / hashlib.sha256(repr(job).encode()).hexdigest()[:16]
    try:
        yield folder
    except BaseException as error:
        size = _size(folder)
        if size:
            error.add_note(
                f"Unfinished work ({format_memory(size)}) is kept in {folder} for "
                f"{UNFINISHED_DAYS} days: the same command goes on from there. Delete the folder "
                "to free the space."
            )
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files; another process may delete some meanwhile."""
    size = 0
    with suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                size += path.stat().st_size if path.is_file() else 0
    return size
