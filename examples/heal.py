"""Heal a domain's pathway, and say what it is worth beside the dense model tuned equally.

Usage: python examples/heal.py FOLDER DOMAIN TEXT OUTPUT [TOKENS]   (FOLDER as `build` made it)
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp


def main(folder: str, domain: str, text: str, output: str, tokens: str = "409600") -> None:
    """Train the kept weights; hold documents out if you want to evaluate the result."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = sp.HealingSettings(
        tokens=int(tokens),
        train="weights",
        loss="lm+kl",
        teacher="cut",
        dense_first=0.5,
        dense_partner=True,
    )
    healed = sp.heal(
        model, tokenizer, {domain: text}, settings=settings, work_folder=f"{output}-unfinished"
    )
    report = healed.reports[domain]
    print(f"pathway: loss {report.before:.3f}, healed {report.healed:.3f}")
    print(f"dense:   loss {report.dense:.3f}, tuned equally {report.tuned:.3f}")
    print(f"healed / dense tuned equally, in perplexity: {report.honest_ratio:.3f}")

    model.set_pathways(healed.pathways)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
