"""The whole product on a real model: fetch, build, reload in a fresh process, measure, generate.

``make demo`` runs it; ``MODEL=`` (a Hub id or folder) and ``DOMAINS="name=path name=path"`` put
your own in place of the fetched ones. What the same code built with the same settings is used
again.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from hf_sparse_pathways.files import code_digest

HERE = Path(__file__).parent
TEXTS = ("code", "law", "medicine")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="", help="Hub id or folder; fetched if empty")
    parser.add_argument("--domains", default="", help="name=path name=path; fetched if empty")
    parser.add_argument("--sparsity", default="0.3")
    parser.add_argument("--readme", help="a Markdown file to write the results into")
    arguments = parser.parse_args()
    cache: Path = arguments.cache
    model, domains = fetch_missing(cache, arguments.model, shlex.split(arguments.domains))
    started = time.perf_counter()
    speed = ["--quick"] if arguments.readme is None else []
    place = cache / ("demo" if speed else "results")
    output = build_once(place, model, domains, ["--sparsity", arguments.sparsity, *speed])
    readme = ["--readme", arguments.readme] if arguments.readme else []
    run([sys.executable, str(HERE / "show.py"), str(output), *domains, *readme])
    minutes = (time.perf_counter() - started) / 60
    print(f"\nDemo finished in {minutes:.1f} minutes, fetching not counted.")


def fetch_missing(cache: Path, model: str, domains: list[str]) -> tuple[str, list[str]]:
    """Fetch what the user did not give; return the model and ``name=path`` pairs."""
    wanted = [] if model else ["--model"]
    wanted += [] if domains else ["--texts"]
    if wanted:
        run([sys.executable, str(HERE / "fetch.py"), "--cache", str(cache), *wanted])
    fetched = [f"{name}={cache / 'texts' / name}" for name in TEXTS]
    return model or str(cache / "smollm2-135m-instruct"), domains or fetched


def build_once(folder: Path, model: str, domains: list[str], options: list[str]) -> Path:
    """Build the pathways with the command line, unless the same code has built the same ones."""
    settings = {
        "model": model,
        "domains": domains,
        "options": options,
        "code": code_digest(),
    }
    record = folder / "settings.json"
    output = folder / "model"
    if record.is_file() and json.loads(record.read_text()) == settings and output.is_dir():
        print(f"{output}: built already with the same settings")
        return output
    command = [sys.executable, "-m", "hf_sparse_pathways.cli.main", "build", model]
    pairs = [part for domain in domains for part in ("--domain", domain)]
    run([*command, *pairs, *options, "--overwrite", "--output", str(output)])
    record.write_text(json.dumps(settings, indent=2))
    return output


def run(command: list[str]) -> None:
    """Run a command in a fresh process; stop here if it fails, with its own message above."""
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
