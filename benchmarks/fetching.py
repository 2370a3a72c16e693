"""Fetch a model and texts, as the demo does, before something is measured on them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_FETCH = Path(__file__).parents[1] / "demo" / "fetch.py"


def fetch(cache: Path, model: str | None = None, texts: Sequence[str] = ()) -> None:
    """Put a model and domains' texts into the cache, if they are not there; stop if that fails."""
    command = [sys.executable, str(_FETCH), "--cache", str(cache)]
    command += [] if model is None else ["--model", model]
    command += ["--texts", *texts] if texts else []
    if subprocess.run(command).returncode:
        sys.exit(1)
