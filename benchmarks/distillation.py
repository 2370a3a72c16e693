"""A dense model's FFN blocks as sgatlin layers, beside the dense blocks and linear maps.

``make benchmark-distil`` runs it: an hour or two on one core. Finished blocks are kept in the cache
folder, so that it can be interrupted.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fetching import fetch
from materials import Materials
from publishing import Section, add_page, to_markdown

import hf_sparse_pathways as sp
from hf_sparse_pathways.files import write_atomically
from hf_sparse_pathways.healing.distilling import EndToEnd
from hf_sparse_pathways.healing.reconstruction import Reconstruction

SECTION = Section("distillation", "benchmark-distil")


def main() -> None:
    """Distil, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domain", default="code")
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 15, 28])
    parser.add_argument("--experts", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=131_072)
    parser.add_argument("--scored-tokens", type=int, default=16_384, help="held out")
    parser.add_argument("--steps", type=int, default=800, help="of each block by itself")
    parser.add_argument("--together", type=int, default=32, help="of all blocks")
    add_page(parser)
    given = parser.parse_args()
    fetch(given.cache, given.model, [given.domain])
    materials = Materials.of(given, "distillation", [given.domain])
    ffn = sp.SgatlinConfig(n_experts=given.experts, n_channels=given.channels)
    alone, together = Reconstruction(steps=given.steps), EndToEnd(steps=given.together)
    made = sp.distil(
        materials.dense,
        materials.tokenizer,
        given.cache / "texts" / given.domain,
        ffn,
        blocks=given.blocks,
        max_tokens=given.max_tokens,
        scored_tokens=given.scored_tokens,
        reconstruction=alone,
        end_to_end=together,
        work_folder=materials.work / "unfinished",
    )
    result = json.dumps(made.to_dict(), indent=1, allow_nan=False)
    write_atomically(materials.work / "distillation.json", result.encode())
    caption = (
        f"**{given.model}**, {given.domain}: sgatlin of {_say(ffn.to_dict())}; each block by "
        f"itself: {_say(vars(alone))}; end to end: {_say(vars(together))}."
    )
    SECTION.publish(to_markdown(caption, made.sections()), given.page)


def _say(settings: Mapping[str, Any]) -> str:
    hidden = ("kind", "seed", "save_steps")
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in hidden)


if __name__ == "__main__":
    main()
