"""Pathways beside other methods on real models: fetch, compare, and write the README's table.

``make benchmark`` runs it. It takes hours on two cores; every finished step is kept in the cache
folder, so it can be interrupted. The comparison itself is ``sparse-pathways compare``.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from hf_sparse_pathways.files import write_between
from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow

FETCH = Path(__file__).parents[1] / "demo" / "fetch.py"
MODELS = ("smollm2-135m-instruct", "gemma3-270m")
DOMAINS = ("code", "law", "fiction", "math")
MAX_TOKENS = "65536"
START, END = "<!-- comparison: written by `make benchmark` -->", "<!-- /comparison -->"


def main() -> None:
    """Run the comparison of each model and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sparsity", default="0.2,0.3,0.5")
    parser.add_argument("--max-tokens", default=MAX_TOKENS, help="calibration tokens per domain")
    parser.add_argument("--scored-tokens", default="16384", help="held-out tokens per domain")
    parser.add_argument("--methods", nargs="+", default=[], help="as compare's --method")
    parser.add_argument("--readme", type=Path, help="a Markdown file to write the tables into")
    parser.add_argument(
        "--measured", action="store_true", help="run nothing: write what was measured before"
    )
    arguments = parser.parse_args()
    if not arguments.measured:
        measure(arguments)
    measured = {}
    for model in arguments.models:
        report = read_report(work_folder(arguments, model) / "comparison.json")
        heading = f"**{model}**, calibrated on {arguments.max_tokens} tokens per domain"
        measured[heading] = split_tables(report.to_markdown())
    if arguments.readme is not None:
        text = arguments.readme.read_text(encoding="utf-8")
        known = split_models(text[text.index(START) + len(START) : text.index(END)])
        write_between(arguments.readme, START, END, join(known, measured))


def split_tables(text: str) -> dict[str, str]:
    """Return a report's parts by the sparsity that they begin with."""
    parts = re.split(r"^(?=[\d.]+% of the FFN FLOPs removed)", text, flags=re.MULTILINE)
    return {part.split("%", 1)[0]: part.strip() for part in parts if part.strip()}


def split_models(text: str) -> dict[str, dict[str, str]]:
    """Return the parts that were written before, by heading and sparsity."""
    parts = re.split(r"^(?=\*\*)", text, flags=re.MULTILINE)
    pairs = (part.strip().split("\n", 1) for part in parts if part.strip())
    return {heading: split_tables(tables) for heading, tables in pairs}


def join(known: dict[str, dict[str, str]], measured: dict[str, dict[str, str]]) -> str:
    """Return all parts, those of other models, texts and sparsities as they were.

    A table takes hours, so that each may be measured on another machine.
    """
    written = []
    for heading in {**known, **measured}:
        tables = {**known.get(heading, {}), **measured.get(heading, {})}
        written += [heading, *(tables[sparsity] for sparsity in sorted(tables, key=float))]
    return "\n\n".join(written)


def work_folder(arguments: argparse.Namespace, model: str) -> Path:
    """Return where a model's finished steps lie; those of another text size lie apart."""
    tokens = arguments.max_tokens
    name = model if tokens == MAX_TOKENS else f"{model}-{tokens}"
    return Path(arguments.cache) / "benchmarks" / name


def measure(arguments: argparse.Namespace) -> None:
    """Fetch the models and texts, and compare."""
    cache: Path = arguments.cache
    run([sys.executable, str(FETCH), "--cache", str(cache), "--texts", *DOMAINS])
    for model in arguments.models:
        run([sys.executable, str(FETCH), "--cache", str(cache), "--model", model])
        output = work_folder(arguments, model)
        pairs = [f"{domain}={cache / 'texts' / domain}" for domain in DOMAINS]
        command = [sys.executable, "-m", "hf_sparse_pathways.cli.main", "compare"]
        command += [str(cache / model), *(part for pair in pairs for part in ("--domain", pair))]
        command += [part for method in arguments.methods for part in ("--method", method)]
        command += ["--sparsity", arguments.sparsity, "--max-tokens", arguments.max_tokens]
        command += ["--scored-tokens", arguments.scored_tokens, "--output", str(output)]
        run(command)


def read_report(path: Path) -> ComparisonReport:
    """Read what ``compare`` wrote."""
    if not path.is_file():
        sys.exit(f"{path} is not there: leave out --measured, or the model.")
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(ComparisonRow.from_dict(row) for row in data["rows"])
    return ComparisonReport(base=data["base"], rows=rows)


def run(command: list[str]) -> None:
    """Run a command; stop here if it fails, with its own message above."""
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
