"""Models, tokenizers and output folders, as the commands need them."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.memory import format_memory

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_dense(name: str, dtype: str) -> tuple[Any, Any]:
    """Load a dense causal LM and its tokenizer."""
    from transformers import AutoTokenizer

    return load_model(name, dtype), AutoTokenizer.from_pretrained(name)


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
    from transformers import AutoTokenizer

    from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM

    _check_dtype(dtype)
    model = SparsePathwaysForCausalLM.from_pretrained(name, dtype=dtype, executor=executor)
    return model.eval(), AutoTokenizer.from_pretrained(name)


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


def check_output(folder: Path, overwrite: bool, marker: str, option: str = "--output") -> None:
    """Check that an output folder may be written, before any work is done.

    Args:
        folder: It may be absent or empty, or with ``overwrite`` an earlier output.
        overwrite: Whether an earlier output may be replaced.
        marker: The file by which an earlier output is known; nothing else is ever replaced.
        option: The option that names the folder, for the message.

    Raises:
        PathwaysError: It may not.
    """
    _try_writing(folder, option)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if folder.is_dir() and (folder / marker).is_file():
        if overwrite:
            return
        raise PathwaysError(f"{folder} is not empty. Pass --overwrite to replace what is there.")
    raise PathwaysError(
        f"{folder} exists and was not written by this command (it has no {marker}), so it is "
        f"left alone. Choose another {option}."
    )


def _try_writing(folder: Path, option: str) -> None:
    """Make and delete a folder where the output will be prepared: permissions do not say it all.

    Raises:
        PathwaysError: It cannot be made.
    """
    try:
        place = _staging(folder, option)
        while not place.exists():
            place = place.parent
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=f".{folder.absolute().name}."))
    except OSError as error:
        raise PathwaysError(
            f"{folder} cannot be written ({error.strerror}). Choose another {option}."
        ) from error


def _staging(folder: Path, option: str = "--output") -> Path:
    """Return where an output is prepared: beside it, or in it where it cannot be renamed.

    Raises:
        PathwaysError: Neither can be written.
    """
    folder = folder.absolute()
    beside = folder.parent
    while not beside.exists():
        beside = beside.parent
    if os.access(beside, os.W_OK | os.X_OK) and beside.is_dir() and not folder.is_mount():
        return folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return folder
    raise PathwaysError(f"{folder} cannot be written. Choose another {option}.")


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
        if time.time() - other.stat().st_mtime > UNFINISHED_DAYS * 86400:
            shutil.rmtree(other, ignore_errors=True)
    folder = place / hashlib.sha256(repr(job).encode()).hexdigest()[:16]
    try:
        yield folder
    except BaseException as error:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size:
            error.add_note(
                f"Unfinished work ({format_memory(size)}) is kept in {folder} for "
                f"{UNFINISHED_DAYS} days: the same command goes on from there. Delete the folder "
                "to free the space."
            )
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill that takes the output's place only when the block has succeeded."""
    folder = folder.absolute()
    staging = _staging(folder)
    staging.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=staging, prefix=f".{folder.name}."))
    earlier = partial.with_name(f"{partial.name}.earlier")
    try:
        yield partial
        partial.chmod(0o755)
        if staging == folder:
            _fill(folder, partial)
            return
        if folder.exists():
            folder.rename(earlier)
        try:
            partial.rename(folder)
        except BaseException:
            if earlier.exists():
                earlier.rename(folder)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, partial: Path) -> None:
    """Replace what is in a folder by what was prepared in it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path != partial:
                shutil.rmtree(path)
        else:
            path.unlink()
    for path in partial.iterdir():
        path.rename(folder / path.name)
