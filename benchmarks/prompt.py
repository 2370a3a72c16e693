"""What picking neurons from a prompt costs, and what it gains, beside dense and a named pathway.

``make benchmark-prompt`` runs it; nothing else should be running. It generates from a random prompt
at batch 1 with all neurons, with random keep masks of the same size, and with neurons picked from
the prompt by each rule, in turn. Of each call it takes the time to the first token (the prompt, and
picking), of the next step (kept rows and columns are gathered in it), and of the steps after it,
over dense.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fetching import fetch
from materials import LARGE, REAL, load_shape
from publishing import Section, add_page
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.executors import has_own_dense
from hf_sparse_pathways.ffn.prompt_rules import RULES
from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.results import Spread
from hf_sparse_pathways.measure.speed.runs import generate, random_ids
from hf_sparse_pathways.measure.speed.timing import alternate
from hf_sparse_pathways.measure.speed.workloads import Workload

SECTION = Section("prompt", "benchmark-prompt")

DENSE = "dense"
COLUMNS = ("time to the first token", "next step", "later tokens/s", "whole call")


def main() -> None:
    """Time a given model, or a real one and the shape of a larger one, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="Folder or Hub id of a dense model.")
    which.add_argument("--shape", help="Of a random one: LAYERSxD_MODELxD_FF.")
    parser.add_argument("--dtype", help="Of --model or --shape. [float32]")
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=256, help="Tokens.")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    add_page(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = arguments.dtype or "float32"
    models: dict[tuple[str, str], Callable[[], Any]]
    if arguments.model is not None:
        models = {(arguments.model, dtype): partial(load, arguments.model, dtype)}
    elif arguments.shape is not None:
        models = {(arguments.shape, dtype): partial(load_shape, arguments.shape, dtype)}
    elif arguments.dtype is not None:
        parser.error("--dtype is of a --model or --shape")
    else:
        fetch(arguments.cache, REAL)
        models = {
            (REAL, "float32"): partial(load, arguments.cache / REAL, "float32"),
            (LARGE, "bfloat16"): partial(load_shape, LARGE, "bfloat16"),
        }
    tables = [compare(arguments, *names, make()) for names, make in models.items()]
    SECTION.publish("\n\n".join(tables), arguments.page)


def load(folder: str | Path, dtype: str) -> Any:
    """Return a dense model of a folder or the Hub."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def compare(arguments: argparse.Namespace, name: str, dtype: str, dense: Any) -> str:
    """Time every arm, and return the table with its caption."""
    ids = random_ids(dense, Workload(kind="decode", tokens=arguments.prompt))
    model = sp.SparsePathwaysForCausalLM.from_dense(
        dense, _random_masks(dense, arguments.sparsity), executor=arguments.executor
    )
    times: dict[str, list[tuple[float, ...]]] = {}
    arms: dict[str, Callable[[], float]] = {}
    for label, domain, rule in (
        (DENSE, None, "griffin"),
        ("a named pathway", "random", "griffin"),
        *((f"prompt, {rule}", "prompt", rule) for rule in RULES),
    ):
        settings = {"sparsity": arguments.sparsity, "rule": rule}
        seen = times.setdefault(label, [])
        arms[label] = partial(_call, model, ids, arguments.new_tokens, domain, settings, seen)
    alternate(arms, arguments.rounds, "generate")
    rows = [[label, *_row(seen[1:], times[DENSE][1:])] for label, seen in times.items()]
    own = "with the same kernels" if has_own_dense(arguments.executor) else "as torch computes it"
    caption = (
        f"**{name}**, {dtype}, {arguments.sparsity:.0%} of the FFN neurons left out, "
        f"{arguments.prompt} tokens of prompt, {arguments.new_tokens} new ones, batch 1, "
        f"{arguments.threads} thread(s), executor {model.execution.executor}: ratio to dense, "
        f"{own}, median (quartiles) of {arguments.rounds} alternating rounds."
    )
    return f"{caption}\n\n{markdown_table(['arm', *COLUMNS], rows)}"


def _call(
    model: Any,
    ids: torch.Tensor,
    new_tokens: int,
    domain: str | None,
    settings: dict[str, Any],
    seen: list[tuple[float, ...]],
) -> float:
    """Generate once, and note first, next, later and all seconds."""
    model.set_prompt_pathways(**settings)
    started = clock.now()
    ticks = generate(model, ids, new_tokens, domain=domain)
    seen.append(
        (ticks[0] - started, ticks[1] - ticks[0], ticks[-1] - ticks[1], ticks[-1] - started)
    )
    return seen[-1][-1]


def _row(seen: list[tuple[float, ...]], dense: list[tuple[float, ...]]) -> list[str]:
    cells = []
    for column, name in enumerate(COLUMNS):
        ratios = [a[column] / b[column] for a, b in zip(seen, dense, strict=True)]
        cells.append(str(Spread.of([1 / ratio for ratio in ratios] if "/s" in name else ratios)))
    return cells


def _random_masks(model: Any, sparsity: float) -> sp.Pathways:
    generator = torch.Generator().manual_seed(0)
    masks = [
        torch.rand(block.d_ff, generator=generator) >= sparsity for block in find_blocks(model)
    ]
    return sp.Pathways.from_masks(model, {"random": masks})


if __name__ == "__main__":
    main()
