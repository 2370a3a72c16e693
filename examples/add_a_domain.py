"""Put domains on the Hub one by one, each as one small commit on top of the others.

Usage: python examples/add_a_domain.py FOLDER REPO [DOMAIN ...]   (FOLDER made by
`sparse-pathways build`; the account is that of `hf auth login`)
"""

import sys

from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp


def main(folder: str, repo: str, *domains: str) -> None:
    """Push the first domain if there is no repository yet, add the others, and load them."""
    paths = sp.Pathways.from_pretrained(folder)
    names = list(domains or paths.domains)
    if not HfApi().repo_exists(repo):
        first = names.pop(0)
        print(f"{first}: {paths.subset([first]).push_to_hub(repo)}")
    for name in names:
        print(f"{name}: {sp.add_domains(paths.subset([name]), repo)}")

    shared = sp.Pathways.from_pretrained(repo)
    print(shared)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_pathways(shared)
    print(f"{folder} computes {', '.join(model.domains)}, as they are on the Hub.")


if __name__ == "__main__":
    main(*sys.argv[1:])
