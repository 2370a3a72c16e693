"""What ``domain="auto"`` and its guard do to quality, and what they cost, on a real model.

``make benchmark-auto`` runs it: it builds pathways of the known domains, and measures prompts of
held-out documents of theirs, of other domains, and of text that is near one of them (C++ beside
Python). ``sparse-pathways route-report --quality --guard`` does the same for a model of yours;
``benchmarks/routing.py`` routes for every choice of known domains. What was measured of a model is
kept in the cache folder, and not measured again with the same settings.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from fetching import fetch
from materials import Materials
from publishing import Section, add_page, to_markdown

import hf_sparse_pathways as sp
from hf_sparse_pathways.files import write_atomically
from hf_sparse_pathways.measure.routing import measure_routing

SECTION = Section("auto", "benchmark-auto")

MODELS = ("smollm2-135m-instruct", "gemma3-270m")

RIDGE = 0.01
"""Fixed, so that no search is made: what is measured is the choice between pathways."""


def main() -> None:
    """Build what is not built, measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--domains", nargs="+", default=["code", "law"], help="known ones")
    parser.add_argument("--unknown", nargs="*", default=["fiction", "math", "medicine", "cpp"])
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--max-tokens", type=int, default=32768, help="calibration, per domain")
    parser.add_argument("--prompts", type=int, default=100, help="per text and length")
    parser.add_argument("--quality-prompts", type=int, default=32, help="per text")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8, 32, 64, 128, 512])
    add_page(parser)
    given = parser.parse_args()
    SECTION.publish("\n\n".join(measure_once(given, model) for model in given.models), given.page)


def measure_once(given: Any, model: str) -> str:
    """Return a model's tables, measured unless they were."""
    given = argparse.Namespace(**vars(given), model=model)
    name = f"{'-'.join(given.domains)}-{given.sparsity:g}-{given.max_tokens}"
    counts = [given.prompts, given.quality_prompts, *given.lengths]
    materials = Materials.of(given, "auto", given.domains)
    kept = materials.work / f"{'-'.join(map(str, [name, *given.unknown, *counts]))}.md"
    if not kept.is_file():
        fetch(given.cache, model, [*given.domains, *given.unknown])
        choose = partial(select, materials, given.sparsity, given.max_tokens)
        text = measure(given, materials, materials.pathways(name, choose))
        write_atomically(kept, text.encode())
    return kept.read_text(encoding="utf-8")


def measure(given: Any, materials: Materials, pathways: sp.Pathways) -> str:
    """Return the tables of a model with pathways of the known domains."""
    report = measure_routing(
        sp.SparsePathwaysForCausalLM.from_dense(materials.dense, pathways),
        materials.tokenizer,
        {name: given.cache / "texts" / name for name in (*given.domains, *given.unknown)},
        lengths=given.lengths,
        max_prompts=given.prompts,
        quality_prompts=given.quality_prompts,
        guard=True,
    )
    caption = (
        f"**{materials.model}**, pathways of {' and '.join(given.domains)} at {given.sparsity:.0%} "
        f"sparsity, from {given.max_tokens} tokens each."
    )
    return to_markdown(caption, report.sections())


def select(materials: Materials, sparsity: float, max_tokens: int) -> sp.Pathways:
    """Return pathways of the known domains, and the pooled one."""
    profile = materials.profile(max_tokens=max_tokens)
    return sp.select(
        materials.dense,
        profile,
        sparsity=sparsity,
        order="one-shot",
        allocation="balanced",
        ridge=RIDGE,
        precision="fastest",
    )


if __name__ == "__main__":
    main()
