"""Train a LoRA under one domain's pathway with PEFT; from then on it switches with the domain.

Usage: python examples/domain_adapters.py FOLDER DOMAIN TEXTS ADAPTER [STEPS]
(FOLDER is made by `sparse-pathways build`, TEXTS is a folder, ADAPTER is written.)
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways  # noqa: F401  (registers with the auto classes)


def windows(tokenizer: Any, texts: str, length: int = 128) -> torch.Tensor:
    """Return all of a folder's text in rows of tokens."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(Path(texts).iterdir()))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    length = min(length, len(ids) // 4)
    return ids[: len(ids) // length * length].view(-1, length)


def train(folder: str, domain: str, rows: torch.Tensor, adapter: str, steps: int) -> None:
    """Train attention's LoRA while only the domain's neurons are computed; save it."""
    model = AutoModelForCausalLM.from_pretrained(folder, default_domain=domain)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    config.exclude_modules = r".*mlp.*"  # an adapter of the FFN would need the slower "masked"
    adapted = get_peft_model(model.train(), config)
    optimiser = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    for step in range(steps):
        batch = rows[step % len(rows)][None]
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.save_pretrained(adapter)


def main(folder: str, domain: str, texts: str, adapter: str, steps: str = "30") -> None:
    """Train one, attach it, and show what it does for each domain."""
    rows = windows(AutoTokenizer.from_pretrained(folder), texts)
    train(folder, domain, rows[1:], adapter, int(steps))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.attach_adapters({domain: adapter})
    with torch.no_grad():
        for name in [*model.domains, None]:
            loss = model(rows[:1], labels=rows[:1], domain=name).loss.item()
            print(f"{name or 'dense'}{' with its LoRA' * (name == domain)}: loss {loss:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
