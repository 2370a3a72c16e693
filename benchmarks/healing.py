"""Healing on a real model: pathway, healed, and the dense model tuned equally, on held-out text.

``make benchmark-healing`` runs it. A domain takes hours on two cores; pathways, training and
measurements are kept in the cache folder, so it can be interrupted. ``sparse-pathways heal``
does the same for a model of yours.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fetching import fetch
from materials import Materials
from publishing import Section, add_page

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.files import read_json, write_atomically
from hf_sparse_pathways.measure.figures import markdown_table

SECTION = Section("healing", "benchmark-healing")


def main() -> None:
    """Heal, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domains", nargs="+", default=["code", "fiction"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--max-tokens", type=int, default=65536, help="calibration, per domain")
    parser.add_argument("--tokens", type=int, default=409_600, help="training tokens per domain")
    parser.add_argument("--scored-tokens", type=int, default=16384, help="held out, per domain")
    parser.add_argument("--train", default="weights", help="lora or weights")
    parser.add_argument("--loss", default="lm+kl", help="terms joined by +")
    parser.add_argument("--teacher", default="cut", help="dense, tuned or cut")
    parser.add_argument("--dense-first", type=float, default=0.5, help="fraction of the steps")
    parser.add_argument("--learning-rate", type=float, help="as heal's")
    add_page(parser)
    parser.add_argument(
        "--measured", action="store_true", help="heal nothing: write what was measured before"
    )
    arguments = parser.parse_args()
    if not arguments.measured:
        fetch(arguments.cache, arguments.model, arguments.domains)
    benchmark = Benchmark(arguments)
    rows = benchmark.measure()
    if not rows:
        sys.exit("Nothing was measured with these settings: leave out --measured.")
    table = Table.of(arguments.model, benchmark.settings, rows)
    if arguments.page is not None:
        table = table.beside(SECTION.read(arguments.page.read_text(encoding="utf-8")))
    SECTION.publish(str(table), arguments.page)


class Benchmark:
    """The model, its texts, and where finished work lies."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.settings = sp.HealingSettings(
            tokens=arguments.tokens,
            train=arguments.train,
            loss=arguments.loss,
            teacher=arguments.teacher,
            dense_partner=True,
            dense_first=arguments.dense_first,
            learning_rate=arguments.learning_rate,
        )
        self.materials = Materials.of(arguments, "healing", arguments.domains, dtype=None)

    def measure(self) -> list[dict[str, Any]]:
        """Return one row per sparsity and domain, healing what was not, if that is wanted."""
        rows = []
        for domain in self.arguments.domains:
            for sparsity in self.arguments.sparsity:
                path = self.materials.work / f"{self._name(domain, sparsity)}.json"
                if not path.is_file() and self.arguments.measured:
                    continue
                if not path.is_file():
                    row = self._heal(domain, sparsity)
                    write_atomically(path, json.dumps(row, indent=1).encode())
                rows.append(read_json(path))
        return rows

    def _name(self, domain: str, sparsity: float) -> str:
        given, own = self.arguments, self.settings
        how = f"{own.train}-{own.loss}-{own.teacher}".replace(":", "")
        how += f"-{own.dense_first:g}-{own.rate:g}"
        tokens = f"{given.max_tokens}-{given.tokens}-{given.scored_tokens}"
        return f"{domain}-{sparsity:g}-{how}-{tokens}"

    def _heal(self, domain: str, sparsity: float) -> dict[str, Any]:
        """Heal one pathway; the dense partner's run is shared by all sparsities."""
        model = sp.SparsePathwaysForCausalLM.from_dense(
            self.materials.dense, self._pathways(sparsity)
        )
        training, held_out = self.materials.texts[domain]
        before = self._evaluate(model, domain, held_out)
        healed = sp.heal(
            model,
            self.materials.tokenizer,
            {domain: training},
            settings=self.settings,
            work_folder=self.materials.work / "unfinished",
        )
        healed.pathways.save_pretrained(self.materials.work / self._name(domain, sparsity))
        model.set_pathways(healed.pathways)
        after = self._evaluate(model, domain, held_out)
        return {
            "domain": domain,
            "sparsity": sparsity,
            "before": before["pathway"],
            "healed": after["pathway"],
            "tuned": after["tuned"],
            "report": healed.reports[domain].to_dict(),
        }

    def _pathways(self, sparsity: float) -> sp.Pathways:
        """Return the pathways that are healed, from the cache if they are there."""
        given = self.arguments

        def make() -> sp.Pathways:
            profile = self.materials.profile(max_tokens=given.max_tokens, precision="fastest")
            options: dict[str, Any] = {"precision": "fastest", "controls": False}
            return sp.select(self.materials.dense, profile, sparsity=sparsity, **options)

        named = (*self.materials.domains, f"{sparsity:g}", str(given.max_tokens))
        return self.materials.pathways(f"pathways-{'-'.join(named)}", make)

    def _evaluate(self, model: Any, domain: str, held_out: Documents) -> dict[str, dict[str, Any]]:
        report = sp.evaluate(
            model,
            self.materials.tokenizer,
            {domain: held_out},
            controls=False,
            max_tokens=self.arguments.scored_tokens,
        )
        return {row.role: asdict(row) for row in report.rows}


@dataclass(frozen=True)
class Table:
    """Rows of figures that were measured with the same settings.

    Attributes:
        how: The settings, which begin the caption.
        tokens: Least number that was trained on.
        scored: Least number that was held out.
        cells: Domain and sparsity -> the other columns.
    """

    how: str
    tokens: int
    scored: int
    cells: dict[tuple[str, str], list[str]]

    @classmethod
    def of(cls, model: str, how: sp.HealingSettings, rows: Sequence[dict[str, Any]]) -> "Table":
        """Take what was measured."""
        cells = {}
        for row in rows:
            ratios = [row[arm]["ratio"] for arm in ("before", "healed", "tuned")]
            ratios.append(row["healed"]["perplexity"] / row["tuned"]["perplexity"])
            cells[row["domain"], f"{row['sparsity']:.0%}"] = [f"{ratio:.3f}" for ratio in ratios]
        return cls(
            how=f"{model}, healed with `--train {how.train} --loss {how.loss} --teacher "
            f"{how.teacher} --dense-first {how.dense_first:g} --learning-rate {how.rate:g}`",
            tokens=min(row["report"]["tokens"] for row in rows),
            scored=min(row["healed"]["tokens"] for row in rows),
            cells=cells,
        )

    def beside(self, own: str) -> "Table":
        """Return the table with those rows that a text has of the same settings, and it has not.

        A domain takes hours, so that each may be measured on another machine.
        """
        numbers = re.search(re.escape(self.how) + r" on at least (\d+) .* at least (\d+) ", own)
        if numbers is None:
            return self
        listed = [line.strip("| ").split(" | ") for line in own.splitlines() if line[:1] == "|"]
        cells = {(row[0], row[1]): row[2:] for row in listed[2:]}
        return Table(
            how=self.how,
            tokens=min(self.tokens, int(numbers[1])),
            scored=min(self.scored, int(numbers[2])),
            cells=cells | self.cells,
        )

    def __str__(self) -> str:
        header = ["domain", "sparsity", "pathway / dense", "healed / dense", "dense tuned / dense"]
        rows = [[*names, *self.cells[names]] for names in sorted(self.cells)]
        return (
            f"{self.how} on at least {self.tokens} tokens per domain. Perplexity ratios on at "
            f"least {self.scored} held-out tokens per domain; the last column is what counts: "
            "what is adaptation to the text, the dense model gains too.\n\n"
            + markdown_table([*header, "healed / dense tuned"], rows)
        )


if __name__ == "__main__":
    main()
