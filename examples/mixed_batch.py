"""Serve several domains in one batch: every row computes with its own domain's neurons.

Usage: python examples/mixed_batch.py FOLDER   (made by `sparse-pathways build`)
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways  # noqa: F401  (registers with the auto classes)


def main(folder: str) -> None:
    """Continue one prompt per domain, and one densely, in a single call."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    domains = [*model.domains, None]
    prompts = [f"A short text about {domain or 'anything'}:" for domain in domains]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, domain=domains, max_new_tokens=20, do_sample=False)
    for domain, text in zip(domains, tokenizer.batch_decode(output), strict=True):
        print(f"{domain}: {text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
