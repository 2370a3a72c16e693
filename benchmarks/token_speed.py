"""Speed of pathways that choose neurons token by token, beside a static one of the same FLOPs.

``make benchmark-token-speed`` runs it with one thread and nothing else on the machine. Pathways are
selected for a real text, which prompts are taken from, too: how many neurons a token skips, and how
tokens spread over clusters and groups, depends on both. They are kept in the cache folder.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fetching import fetch
from materials import Materials, stored_bytes
from publishing import Section, add_page
from torch import Tensor

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.routing import draw_prompts
from hf_sparse_pathways.measure.speed.results import Spread
from hf_sparse_pathways.measure.speed.runs import decode, prefill_speed
from hf_sparse_pathways.measure.speed.timing import alternate
from hf_sparse_pathways.native.processor import capabilities, slow_dtypes

SECTION = Section("token speed", "benchmark-token-speed")

DENSE, STATIC = "dense", "static"
ARMS: dict[str, dict[str, Any]] = {
    STATIC: {},
    "skip-50": {"skip": 0.5},
    "clusters-16": {"clusters": 16},
    "clusters-16-skip-50": {"clusters": 16, "skip": 0.5},
    "groups-32": {"mixture": 32},
}
"""Arm -> what it selects with."""

PROMPT = 16
"""Tokens before those that are decoded."""


def main() -> None:
    """Select what was not, time every arm, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domain", default="code")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--max-tokens", type=int, default=65536, help="calibration")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--executors", nargs="+", default=["compact", "indexed"])
    parser.add_argument("--passes", nargs="+", type=int, default=[256, 1024], help="tokens each")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    add_page(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fetch(arguments.cache, arguments.model, [arguments.domain])
    benchmark = Benchmark(arguments)
    text = "\n\n".join(benchmark.section(dtype) for dtype in arguments.dtypes)
    SECTION.publish(text, arguments.page)


class Benchmark:
    """The model, its text, and where its pathways lie."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.materials = Materials.of(arguments, "token-speed", [arguments.domain])
        self.arms = list(dict.fromkeys([STATIC, *arguments.arms]))
        self.ids = self._draw()

    def section(self, dtype: str) -> str:
        """Return the caption and the table of a data type."""
        given = self.arguments
        made = {arm: self.pathways(arm) for arm in self.arms}
        pathways = sp.Pathways(
            base=made[STATIC].base, by_domain={arm: own[given.domain] for arm, own in made.items()}
        )
        dense = replace(self.materials, dtype=dtype).dense
        model: Any = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
        model.max_resident_bytes *= len(made) + 2
        rows, notes = [], []
        for executor in given.executors:
            model.set_executor(executor)
            if model.execution.executor == executor:
                rows += self._rows(model, executor, pathways)
            else:
                notes.append(f" Not timed: {executor}, since {model.execution.reason}.")
        caption = (
            f"**{given.model}**, {given.domain}, calibrated on {given.max_tokens} tokens; {dtype}, "
            f"{given.threads} thread(s) of {_processor(dtype)}: median (quartiles) of "
            f"{given.rounds} alternating rounds. "
            f"Decoding {given.new_tokens} tokens after {PROMPT} at batch 1, each arm its own, and "
            f"passes of {', '.join(map(str, given.passes))} tokens, as speeds over those of dense "
            "with the same executor. What is stored is the pathway alone." + "".join(notes)
        )
        header = ["executor", "arm", "FFN FLOPs", "decode / dense", "/ static"]
        header += [cell for n in given.passes for cell in (f"{n} tokens / dense", "/ static")]
        return f"{caption}\n\n{markdown_table([*header, 'stored'], rows)}"

    def _rows(self, model: Any, executor: str, pathways: sp.Pathways) -> list[list[str]]:
        given, ids = self.arguments, self.ids
        domains = {DENSE: None, **{arm: arm for arm in self.arms}}
        decoding: dict[str, Callable[[], float]] = {
            arm: partial(decode, model, ids[:, :PROMPT], given.new_tokens, domain=domain)
            for arm, domain in domains.items()
        }
        figures = [alternate(decoding, given.rounds, f"{executor}, decode")]
        for tokens in given.passes:
            passing: dict[str, Callable[[], float]] = {
                arm: partial(prefill_speed, model, ids[:, :tokens], domain=domain, logits_to_keep=1)
                for arm, domain in domains.items()
            }
            figures.append(alternate(passing, given.rounds, f"{executor}, {tokens} tokens"))
        rows = []
        for arm, domain in domains.items():
            ratios = [_over(own, arm, other) for own in figures for other in (DENSE, STATIC)]
            flops = "100%" if domain is None else f"{pathways.flops(domain):.1%}"
            size = "" if domain is None else f"{stored_bytes(pathways[domain]) / 1e6:.0f} MB"
            rows.append([executor, arm, flops, *ratios, size])
        return rows

    def _draw(self) -> Tensor:
        """Return the tokens of a prompt ``(1, tokens)``, from held-out documents."""
        held_out = self.materials.texts[self.arguments.domain][1]
        longest = max(PROMPT, *self.arguments.passes)
        ids = draw_prompts(held_out, self.materials.tokenizer, length=longest, most=1, seed=0)
        if not len(ids):
            sys.exit(
                f"No held-out document of {self.arguments.domain} has {longest} tokens: give "
                "--passes fewer."
            )
        return ids

    def pathways(self, arm: str) -> sp.Pathways:
        """Return an arm's pathways, selected unless they were."""
        given = self.arguments

        def make() -> sp.Pathways:
            return sp.select(
                self.materials.dense,
                self.materials.profile(max_tokens=given.max_tokens),
                sparsity=given.sparsity,
                precision="fastest",
                controls=False,
                **ARMS[arm],
            )

        name = f"{given.domain}-{given.sparsity:g}-{given.max_tokens}-{arm}"
        return self.materials.pathways(name, make)


def _processor(dtype: str) -> str:
    """Return what the processor is called, and whether it only emulates the dtype."""
    name = capabilities().get("cpu_name") or platform.machine()
    emulates = getattr(torch, dtype) in slow_dtypes()
    return f"{name}, which emulates {dtype}" if emulates else str(name)


def _over(figures: dict[str, tuple[float, ...]], arm: str, other: str) -> str:
    """Return an arm's speed over another's, round by round."""
    return str(Spread.of([a / b for a, b in zip(figures[arm], figures[other], strict=True)]))


if __name__ == "__main__":
    main()
