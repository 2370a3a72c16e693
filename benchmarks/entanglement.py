"""Whether a neuron's entanglement tells what sparsifying it costs, as Sparse Expansion says.

``make benchmark-entanglement`` runs it on a real model. ``sparse-pathways analyze --entanglement``
does the same for a model and texts of yours, and draws it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from fetching import fetch
from materials import Materials
from publishing import Section, add_page, to_markdown

from hf_sparse_pathways.measure.entangled_rows import relate_entanglement
from hf_sparse_pathways.measure.entanglement import summarise_entanglement
from hf_sparse_pathways.measure.entanglement_report import measured_sections

SECTION = Section("entanglement", "benchmark-entanglement")


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domains", nargs="+", default=["code", "fiction"])
    parser.add_argument("--max-tokens", type=int, default=16384, help="calibration, per domain")
    parser.add_argument("--scored-tokens", type=int, default=16384, help="held out, per domain")
    add_page(parser)
    given = parser.parse_args()
    fetch(given.cache, given.model, given.domains)
    materials = Materials.of(given, "entanglement", given.domains)
    SECTION.publish(measure(materials, given.max_tokens, given.scored_tokens), given.page)


def measure(materials: Materials, max_tokens: int, scored_tokens: int) -> str:
    """Return the tables of what sparsified rows cost."""
    profile = materials.profile(max_tokens=max_tokens, grams=False, entanglement=True)
    known = summarise_entanglement(profile)
    assert known is not None  # it was asked for
    relations, harms = relate_entanglement(
        materials.dense,
        materials.tokenizer,
        profile,
        {domain: held_out for domain, (_, held_out) in materials.texts.items()},
        max_tokens=scored_tokens,
    )
    measured = replace(known, relations=relations, harms=harms)
    caption = f"**{materials.model}**, calibrated on {max_tokens} tokens per domain."
    return to_markdown(caption, measured_sections(measured))


if __name__ == "__main__":
    main()
