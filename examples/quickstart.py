"""Make pathways for your own texts, save them, load them back, and generate with one domain.

Usage: python examples/quickstart.py MODEL NAME=PATH [NAME=PATH ...] --output FOLDER
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hub id or folder of a dense causal LM")
    parser.add_argument("domains", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--output", required=True)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--max-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    texts = dict(pair.split("=", 1) for pair in arguments.domains)

    dense = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    profile = sp.profile(dense, tokenizer, texts, max_tokens=arguments.max_tokens)
    pathways = sp.select(dense, profile, sparsity=arguments.sparsity)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)

    model = AutoModelForCausalLM.from_pretrained(arguments.output)
    inputs = tokenizer("The first", return_tensors="pt")
    for domain in [*model.domains, None]:
        output = model.generate(**inputs, domain=domain, max_new_tokens=20, do_sample=False)
        print(f"{domain}: {tokenizer.decode(output[0])!r}")


if __name__ == "__main__":
    main()
