"""Profile a large text in parts, on several machines if you like, then select from all of it.

Usage: python examples/profile_in_parts.py part MODEL NAME=PATH FOLDER      (once per part)
       python examples/profile_in_parts.py join MODEL OUTPUT FOLDER [FOLDER ...]
"""

import sys
from functools import reduce

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp


def part(name: str, text: str, folder: str) -> None:
    """Profile one part; when interrupted, the same command goes on where it stopped."""
    domain, path = text.split("=", 1)
    profile = sp.profile(
        AutoModelForCausalLM.from_pretrained(name),
        AutoTokenizer.from_pretrained(name),
        {domain: path},
        work_folder=f"{folder}-unfinished",
    )
    profile.save_pretrained(folder)
    print(profile)


def join(name: str, output: str, *folders: str) -> None:
    """Merge the parts' statistics, and make pathways from them."""
    profile = reduce(sp.Profile.merged, map(sp.Profile.from_pretrained, folders))
    dense = AutoModelForCausalLM.from_pretrained(name)
    pathways = sp.select(dense, profile, sparsity=0.3)
    pathways.save_pretrained(output)
    for domain in pathways.domains:
        print(f"{domain}: {profile[domain].tokens} tokens, {pathways.flops(domain):.0%} of FLOPs")


if __name__ == "__main__":
    {"part": part, "join": join}[sys.argv[1]](*sys.argv[2:])
