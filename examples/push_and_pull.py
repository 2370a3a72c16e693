"""Push a model with its pathways to the Hub, and load it again: whole, at a commit, one domain.

Usage: python examples/push_and_pull.py FOLDER REPO   (FOLDER made by `sparse-pathways build`; the
account is that of `hf auth login`)
"""

import sys

from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp


def main(folder: str, repo: str) -> None:
    """Upload the folder, and its pathways alone beside it; generate from what comes back."""
    print(f"{repo}: {sp.push_folder(folder, repo, sp.CardSettings(license='apache-2.0'))}")
    alone = f"{repo}-pathways"
    print(f"{alone}: {sp.Pathways.from_pretrained(folder).push_to_hub(alone)}")

    commit = HfApi().model_info(repo).sha
    model = AutoModelForCausalLM.from_pretrained(repo, revision=commit)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    inputs = tokenizer("The", return_tensors="pt")
    for domain in model.domains:
        tokens = model.generate(**inputs, domain=domain, max_new_tokens=16, do_sample=False)
        print(f"{domain}: {tokenizer.decode(tokens[0])!r}")

    first = model.domains[0]
    small = AutoModelForCausalLM.from_pretrained(repo, domain=first)
    kept = small.num_parameters() / model.num_parameters()
    print(f"{first} alone: {kept:.0%} of the parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
