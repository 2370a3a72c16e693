"""Reload a model with pathways as any user would, and show what each domain's pathway does."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.files import write_between
from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.measure.report import summarise
from hf_sparse_pathways.measure.speed.pairs import GenerationSpeed, time_generation
from hf_sparse_pathways.measure.speed.switching import describe_switch, time_switch
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM

Speeds = Sequence[GenerationSpeed]

SCORED_TOKENS = 2048
README_TOKENS = 6144
PROMPT_TOKENS = 32
NEW_TOKENS = 40


def main() -> None:
    """Print one table and one pair of continuations per domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("domains", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--readme", type=Path, help="write the results between its markers")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    texts = {name: read_documents(path) for name, path in parse_texts(arguments.domains).items()}

    scored = SCORED_TOKENS if arguments.readme is None else README_TOKENS
    quality = sp.evaluate(model, tokenizer, texts, max_tokens=scored)
    model.set_executor("compact")  # the dense pass's own kernels: packing would speed up both
    speeds = time_generation(model, rounds=5)
    for speed in speeds:
        print_table(quality.caption(speed.domain), *quality.table(speed.domain))
        low, middle, high = (quantile(speed.ratios, q) for q in (0.25, 0.5, 0.75))
        print(
            f"  generate(): dense {quantile(speed.dense, 0.5):.1f} tokens/s, pathway "
            f"{quantile(speed.sparse, 0.5):.1f} tokens/s, {middle:.2f}x "
            f"(quartiles {low:.2f} to {high:.2f}, {len(speed.dense)} alternating rounds)\n"
        )
        prompt = held_out_prompt(model, tokenizer, speed.domain, texts[speed.domain])
        for label, domain in (("dense", None), ("pathway", speed.domain)):
            print(f"  {label}: ...{continue_text(model, tokenizer, prompt, domain)!r}")
    if arguments.readme is not None:
        write_results(arguments.readme, model, quality, speeds)
    if len(model.domains) > 1:
        first, second = model.domains[:2]
        print(f"\n{describe_switch(time_switch(model, first, second))}")


def write_results(
    readme: Path, model: SparsePathwaysForCausalLM, quality: QualityReport, speeds: Speeds
) -> None:
    """Put the measured table between the markers of a Markdown file."""
    first = speeds[0]
    rows = [row for row in quality.rows if row.role == "dense"]
    caption = (
        f"{Path(quality.base).name}, {str(model.dtype).removeprefix('torch.')}, "
        f"{first.sparsity:.0%} of the FFN neurons removed, {torch.get_num_threads()} CPU threads. "
        f"Perplexity (ratio to dense) on {min(row.tokens for row in rows)} held-out tokens per "
        f"domain; speed is the ratio to dense `generate()` at batch 1, with the same kernels "
        f"(executor `{first.executor}`), the median (quartiles) of {len(first.dense)} alternating "
        "rounds."
    )
    start, end = "<!-- results: written by `make results` -->", "<!-- /results -->"
    write_between(readme, start, end, f"{caption}\n\n{summarise(quality, speeds)}")


def held_out_prompt(
    model: SparsePathwaysForCausalLM, tokenizer: Any, domain: str, texts: Documents
) -> str:
    """Return the beginning of a document that was not calibrated on, and print it."""
    seen = model.pathways[domain].provenance["text"]["digests"]
    document = max(texts.without(seen).items[:20], key=lambda document: len(document.text))
    ids = tokenizer(document.text[:2000])["input_ids"][:PROMPT_TOKENS]
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    print(f"  prompt:  {prompt!r}")
    return prompt


def continue_text(
    model: SparsePathwaysForCausalLM, tokenizer: Any, prompt: str, domain: str | None
) -> str:
    """Generate greedily with one domain's neurons, or densely for None."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, domain=domain, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
