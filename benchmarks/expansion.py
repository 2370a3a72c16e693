"""Sparse Expansion's claims on a real model: pruned copies for clusters of tokens, as they grow.

``make benchmark-expansion`` runs it: hours on two cores. Every step, one way at one sparsity, is
kept in the cache folder when it is done, so that it can be interrupted, and run in parts. Copies
are compared with one SparseGPT model (one cluster) at the same sparsity, with one such model per
domain, and with kept neurons: by label, pooled, and in clusters.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fetching import fetch
from materials import Materials, stored_bytes
from publishing import Section, add_page

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.expansion import COPIES, EXPANDED, NEURONS
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.pruned_copies import NONZERO, CopyRecipe, make_copies
from hf_sparse_pathways.discovery.sparsegpt import parse_pattern
from hf_sparse_pathways.files import read_json, write_atomically
from hf_sparse_pathways.measure.arms import DENSE, measure_arms, pathway_arm
from hf_sparse_pathways.measure.figures import markdown_table

SECTION = Section("expansion", "benchmark-expansion")
LABEL_COPIES = "copy per domain"
LABEL_NEURONS = "neurons per domain"
POOLED_NEURONS = "neurons, pooled"
PARTNERS = (LABEL_COPIES, LABEL_NEURONS, POOLED_NEURONS)


def main() -> None:
    """Run every step that is not done, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domains", nargs="+", default=["code", "law", "fiction", "math"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--clusters", nargs="*", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--pattern", default="unstructured", help="of copies; or 2:4")
    parser.add_argument("--partners", nargs="*", default=list(PARTNERS), choices=PARTNERS)
    parser.add_argument("--neurons", nargs="*", type=int, default=[16], help="clusters of neurons")
    parser.add_argument("--max-tokens", type=int, default=131_072, help="calibration, all domains")
    parser.add_argument("--scored-tokens", type=int, default=16384, help="held out, per domain")
    parser.add_argument("--dtype", default="bfloat16", help="copies take so many bytes a weight")
    add_page(parser)
    parser.add_argument(
        "--measured", action="store_true", help="run nothing: write what was measured before"
    )
    arguments = parser.parse_args()
    if not arguments.measured:
        fetch(arguments.cache, arguments.model, arguments.domains)
    benchmark = Benchmark(arguments)
    results = benchmark.measure()
    if not results:
        sys.exit("Nothing was measured with these settings: leave out --measured.")
    table = benchmark.table(results)
    SECTION.publish(table, arguments.page)


@dataclass(frozen=True)
class Step:
    """One way to make the FFN sparse.

    Attributes:
        way: ``copies`` or ``neurons`` in clusters, or one of ``PARTNERS``.
        clusters: How many; 1 for partners.
        sparsity: Of weights, or of FLOPs.
    """

    way: str
    clusters: int
    sparsity: float

    @property
    def title(self) -> str:
        """What stands in the table."""
        if self.way in PARTNERS:
            return self.way
        if self.way == COPIES and self.clusters == 1:
            return "one SparseGPT model"
        return f"{self.way}, {self.clusters} clusters"


class Benchmark:
    """The model, its texts, and where finished steps lie."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.materials = Materials.of(arguments, "expansion", arguments.domains, arguments.dtype)

    def steps(self) -> Iterator[Step]:
        """Yield what is to be measured."""
        given = self.arguments
        for sparsity in given.sparsity:
            yield from (Step(COPIES, count, sparsity) for count in given.clusters)
            yield from (Step(NEURONS, count, sparsity) for count in given.neurons)
            several = len(given.domains) > 1
            for way in given.partners:
                if several or way == LABEL_NEURONS:  # else it is one of the others
                    yield Step(way, 1, sparsity)

    def measure(self) -> dict[Step, dict[str, Any]]:
        """Return the result of each step, measuring those that were not, if that is wanted."""
        results = {}
        for step in self.steps():
            path = self.materials.work / f"{self._name(step)}.json"
            if not path.is_file() and not self.arguments.measured:
                print(f"{step.title}, {step.sparsity:.0%}", flush=True)
                write_atomically(path, json.dumps(self._score(step), indent=1).encode())
            if path.is_file():
                results[step] = read_json(path)
        return results

    def _name(self, step: Step) -> str:
        given = self.arguments
        way = f"{step.way}-{step.clusters}-{step.sparsity:g}".replace(" ", "").replace(",", "-")
        if step.way in (COPIES, LABEL_COPIES):
            way += f"-{given.pattern.replace(':', 'of')}"
        tokens = f"{given.max_tokens}-{given.scored_tokens}-{given.dtype}"
        return f"{way}-{'-'.join(given.domains)}-{tokens}"

    def _score(self, step: Step) -> dict[str, Any]:
        """Make pathways, and measure them on each domain's held-out text."""
        pathways, runs = self._make(step)
        sparse = sp.SparsePathwaysForCausalLM.from_dense(self.materials.dense, pathways)
        if step.way in (COPIES, LABEL_COPIES):
            sparse.set_executor("masked")  # no further copies of the copies
        rows = {}
        for domain in self.arguments.domains:
            text = self.materials.scored(domain, self.arguments.scored_tokens)
            name = runs or domain
            with evaluation_mode(sparse):
                arms = [DENSE, pathway_arm("pathway", name, pathways)]
                dense, row = measure_arms(sparse, text, arms, batch_size=4, seed=0)
            rows[domain] = {
                "dense": dense.perplexity,
                "ratio": row.ratio,
                "interval": row.interval,
                "tokens": row.tokens,
                "flops": pathways[name].provenance.get(NONZERO, row.flops),
            }
        stored = sum(map(stored_bytes, pathways.by_domain.values()))
        return {"rows": rows, "bytes": stored}

    def _make(self, step: Step) -> tuple[sp.Pathways, str | None]:
        """Return a step's pathways, and the name of the one for all text, if there is one."""
        own = self.profile(grams=step.way not in (COPIES, LABEL_COPIES))
        pooled = replace(own, by_domain={EXPANDED: own.pooled()})
        if step.way in (COPIES, LABEL_COPIES):
            clustering = None if step.clusters == 1 else sp.Clustering(count=step.clusters)
            pattern = parse_pattern(self.arguments.pattern, step.sparsity)
            recipe = CopyRecipe(pattern=pattern, clustering=clustering, precision="fastest")
            labelled = step.way == LABEL_COPIES
            made = make_copies(self.materials.dense, own if labelled else pooled, recipe)
            return made, None if labelled else EXPANDED
        labelled = step.way == LABEL_NEURONS
        made = sp.select(
            self.materials.dense,
            own if labelled else pooled,
            sparsity=step.sparsity,
            clusters=step.clusters,
            precision="fastest",
            controls=False,
        )
        return made, None if labelled else EXPANDED

    def profile(self, *, grams: bool) -> sp.Profile:
        """Return the profile that all steps share, as many tokens of each domain."""
        given = self.arguments
        tokens = given.max_tokens // len(given.domains)
        return self.materials.profile(
            max_tokens=tokens, grams=grams, inputs=False, precision="fastest"
        )

    def table(self, results: dict[Step, dict[str, Any]]) -> str:
        """Return the caption and the table."""
        rows = []
        for step, found in results.items():
            measured = found["rows"]
            ratios = [measured[name]["ratio"] for name in measured]
            flops = sum(row["flops"] for row in measured.values()) / len(measured)
            rows.append(
                [
                    f"{step.sparsity:.0%}",
                    step.title,
                    f"{flops:.1%}",
                    *(f"{ratio:.3f}" for ratio in ratios),
                    f"{_mean(ratios):.3f}",
                    self._against_one(step, results),
                    f"{found['bytes'] / 1e9:.3g} GB",
                ]
            )
        some = next(iter(results.values()))["rows"]
        dense = ", ".join(f"{name} {row['dense']:.2f}" for name, row in some.items())
        given = self.arguments
        caption = (
            f"**{given.model}** in {given.dtype}, pattern {given.pattern}, calibrated on "
            f"{given.max_tokens} tokens in all; dense perplexity: {dense}. FLOPs of copies are "
            "those of weights that are not zero, as the paper counts them; they are computed as "
            "dense matrices. Perplexity ratios to dense on held-out documents, at least "
            f"{min(row['tokens'] for row in some.values())} tokens per domain."
        )
        header = ["removed", "experts", "FFN FLOPs", *some, "geometric mean", "to one SparseGPT"]
        return f"{caption}\n\n{markdown_table([*header, 'stored'], rows)}"

    @staticmethod
    def _against_one(step: Step, results: dict[Step, dict[str, Any]]) -> str:
        """Return a step's mean ratio over that of one SparseGPT model at the same sparsity."""
        one = results.get(Step(COPIES, 1, step.sparsity))
        if one is None:
            return "-"
        means = [_mean([r["ratio"] for r in f["rows"].values()]) for f in (results[step], one)]
        return f"{means[0] / means[1]:.3f}"


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
