"""A real model's FFN blocks, one after the other, as sgatlin layers: error and perplexity.

python benchmarks/distil_sgatlin.py --model FOLDER --text FOLDER --blocks 2 15 28
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.distillation import Training


def main() -> None:
    """Print a table per block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id or folder of a dense model")
    parser.add_argument("--text", required=True, help="file, folder or glob")
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 15, 28])
    parser.add_argument("--experts", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    config = sp.SgatlinConfig(n_experts=given.experts, n_channels=given.channels)
    for block in given.blocks:
        made = sp.distil_block(
            model,
            tokenizer,
            given.text,
            block,
            config,
            max_tokens=given.tokens,
            training=Training(steps=given.steps),
        )
        print(f"\n{made.to_markdown()}", flush=True)


if __name__ == "__main__":
    main()
