"""Pathways beside other methods on real models: fetch, compare, and write the table.

``make benchmark`` runs it. It takes hours on two cores; every finished step is kept in the cache
folder, so it can be interrupted. The comparison itself is ``sparse-pathways compare``.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fetching import fetch
from publishing import Section, add_page

from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow

MODELS = ("smollm2-135m-instruct", "gemma3-270m")
DOMAINS = ("code", "law", "fiction", "math")
MAX_TOKENS = "65536"
SECTION = Section("comparison", "benchmark")


def main() -> None:
    """Run the comparison of each model and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sparsity", default="0.2,0.3,0.5")
    parser.add_argument("--max-tokens", default=MAX_TOKENS, help="calibration tokens per domain")
    parser.add_argument("--scored-tokens", default="16384", help="held-out tokens per domain")
    parser.add_argument("--methods", nargs="+", default=[], help="as compare's --method")
    add_page(parser)
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
    known = {}
    if arguments.page is not None:
        known = split_models(SECTION.read(arguments.page.read_text(encoding="utf-8")))
    SECTION.publish(join(known, measured), arguments.page)


@dataclass(frozen=True)
class Table:
    """What was measured of one model at one sparsity, as it is written.

    Attributes:
        caption: The line above the table.
        header: The table's first two lines.
        rows: A line per method, best first.
    """

    caption: str
    header: str
    rows: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Table":
        """Take a caption, a table and a verdict apart."""
        lines = text.strip().splitlines()
        listed = [line for line in lines if line.startswith("|")]
        return cls(lines[0], "\n".join(listed[:2]), tuple(listed[2:]))

    def beside(self, known: "Table") -> "Table":
        """Return the table with those methods of one written before that it has not.

        Their ratios are to the dense perplexity of the machine that measured them. What was
        measured on other text than this is left out.
        """
        texts = [table.caption.partition("; dense perplexity")[0] for table in (self, known)]
        if texts[0] != texts[1]:
            return self
        own = {first_cell(row) for row in self.rows}
        rows = [*self.rows, *(row for row in known.rows if first_cell(row) not in own)]
        return Table(self.caption, self.header, tuple(sorted(rows, key=last_number)))

    def __str__(self) -> str:
        table = "\n".join((self.header, *self.rows))
        return "\n\n".join(part for part in (self.caption, table, self._verdict()) if part)

    def _verdict(self) -> str:
        """Say where another method does as well as the pathways, by the figures as written."""
        domains = cells(self.header.splitlines()[0])[2:-1]
        ratios = {first_cell(row): [number(cell) for cell in cells(row)[2:-1]] for row in self.rows}
        own = ratios.pop("pathway", None)
        if own is None or len(ratios) < 2:
            return ""
        better = [
            f"{method} on {domain}"
            for method, others in ratios.items()
            for domain, ratio, mine in zip(domains, others, own, strict=True)
            if ratio <= mine
        ]
        if better:
            return f"As good as pathway, or better: {', '.join(better)}."
        return "No other method of the table is as good as pathway on any domain."


def cells(row: str) -> list[str]:
    """Return the cells of a line of a Markdown table."""
    return [cell.strip() for cell in row.strip("| ").split("|")]


def first_cell(row: str) -> str:
    """Return the method that a line is about."""
    return cells(row)[0]


def number(cell: str) -> float:
    """Return the number that a cell begins with; what was not measured is worse than all."""
    return float(cell.split()[0]) if cell[:1].isdigit() else math.inf


def last_number(row: str) -> float:
    """Return a line's geometric mean."""
    return number(cells(row)[-1])


def split_tables(text: str) -> dict[str, Table]:
    """Return a report's tables by their sparsities."""
    parts = re.split(r"^(?=[\d.]+% of the FFN FLOPs removed)", text, flags=re.MULTILINE)
    return {part.split("%", 1)[0]: Table.read(part) for part in parts if part.strip()}


def split_models(text: str) -> dict[str, dict[str, Table]]:
    """Return the tables that were written before, by heading and sparsity."""
    parts = re.split(r"^(?=\*\*)", text, flags=re.MULTILINE)
    pairs = (part.strip().split("\n", 1) for part in parts if part.strip())
    return {heading: split_tables(tables) for heading, tables in pairs}


def join(known: dict[str, dict[str, Table]], measured: dict[str, dict[str, Table]]) -> str:
    """Return all tables, with what was written before of other models, texts, and methods.

    A table takes hours, so that each, and each method, may be measured on another machine.
    """
    written = []
    for heading in {**known, **measured}:
        tables = dict(known.get(heading, {}))
        for sparsity, table in measured.get(heading, {}).items():
            before = tables.get(sparsity)
            tables[sparsity] = table if before is None else table.beside(before)
        written += [heading, *(str(tables[sparsity]) for sparsity in sorted(tables, key=float))]
    return "\n\n".join(written)


def work_folder(arguments: argparse.Namespace, model: str) -> Path:
    """Return where a model's finished steps lie; those of another text size lie apart."""
    tokens = arguments.max_tokens
    name = model if tokens == MAX_TOKENS else f"{model}-{tokens}"
    return Path(arguments.cache) / "benchmarks" / name


def measure(arguments: argparse.Namespace) -> None:
    """Fetch the models and texts, and compare."""
    cache: Path = arguments.cache
    fetch(cache, texts=DOMAINS)
    for model in arguments.models:
        fetch(cache, model)
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
