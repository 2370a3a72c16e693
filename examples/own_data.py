"""Pathways from text of every kind: a folder, JSON lines, a stream of rows, strings.

Usage: python examples/own_data.py MODEL FOLDER ROWS.jsonl OUTPUT   (each row has a "text")
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp

MAX_TOKENS = 8192


def read_rows(path: str) -> Iterator[dict[str, str]]:
    """Yield one row after the other; nothing is read ahead."""
    with Path(path).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def main(name: str, folder: str, rows: str, output: str) -> None:
    """Make one domain of each source, save the model, and show what its artefact says."""
    dense = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = {
        "files": folder,  # a file, folder or glob
        "rows": read_rows(rows),  # also a Dataset or IterableDataset of `datasets`
        "strings": [row["text"].lower() for row in read_rows(rows)],
    }
    profile = sp.profile(dense, tokenizer, texts, max_tokens=MAX_TOKENS)
    paths = sp.select(dense, profile, sparsity=0.3)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for domain in paths.domains:
        text = paths[domain].provenance["text"]
        print(f"{domain}: {text['tokens']} tokens of {text['documents']} documents")


if __name__ == "__main__":
    main(*sys.argv[1:])
