"""Output folders that are whole or absent.

A folder is filled beside its place and renamed there when all of it is written; nothing is replaced
but what an earlier run of the same kind has written.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_sparse_pathways.errors import PathwaysError


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
