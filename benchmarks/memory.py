"""Peak memory of taking Gram matrices on the shape of a large model, with random weights.

``python benchmarks/memory.py --shape 4096x14336x3 --max-memory 3GB`` builds a Llama of d_model
4096, d_ff 14336 and 3 blocks, profiles random token ids, and prints what the process held at most
beyond the model itself and its activations.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.memory import parse_memory

VOCABULARY = 256
TOKENS = 4096


class ByteTokenizer:
    """Bytes as token ids: enough for random weights."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return a text's bytes."""
        return {"input_ids": list(text.encode())}


def main() -> None:
    """Measure with and without Gram matrices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4096x14336x3", help="d_model x d_ff x blocks")
    parser.add_argument("--max-memory", default="3GB")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    d_model, d_ff, blocks = (int(part) for part in arguments.shape.split("x"))
    model = build(d_model, d_ff, blocks)
    text = "".join(chr(97 + i * i % 26) for i in range(4 * arguments.tokens))
    plain = measure(model, text, arguments, grams=False)
    full = measure(model, text, arguments, grams=True)
    limit = parse_memory(arguments.max_memory)
    used = max(0, full - plain)
    print(
        f"d_model {d_model}, d_ff {d_ff}, {blocks} blocks, {arguments.tokens} tokens: Gram "
        f"matrices of {4 * blocks * (d_ff + d_model + 1) ** 2 / 1e9:.2f} GB in all; at most "
        f"{used / 1e9:.2f} GB more memory than without them, max_memory {limit / 1e9:.2f} GB: "
        f"{'within' if used <= limit else 'ABOVE'} the limit"
    )


def build(d_model: int, d_ff: int, blocks: int) -> Any:
    """Return a random Llama in bfloat16."""
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=blocks,
        num_attention_heads=d_model // 128 or 1,
        num_key_value_heads=max(1, d_model // 512),
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(model: Any, text: str, arguments: argparse.Namespace, *, grams: bool) -> int:
    """Return the peak of the process's memory during one profile, in bytes beyond its start."""
    with tempfile.TemporaryDirectory() as work, peak_memory() as peak:
        sp.profile(
            model,
            ByteTokenizer(),
            {"text": text},
            max_tokens=arguments.tokens,
            batch_size=2,
            grams=grams,
            validation_tokens=0,
            max_memory=arguments.max_memory,
            work_folder=Path(work),
        )
    return peak[0]


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list that holds the largest growth of resident memory after the block, in bytes."""
    process = psutil.Process()
    start = process.memory_info().rss
    peak, running = [0], True

    def watch() -> None:
        while running:
            peak[0] = max(peak[0], process.memory_info().rss - start)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        running = False
        watcher.join()


if __name__ == "__main__":
    main()
