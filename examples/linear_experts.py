"""Train a small model of sparsely gated linear experts, and keep a quarter for each domain.

Usage: python examples/linear_experts.py TOKENIZER OUTPUT STEPS NAME=TEXT NAME=TEXT ...
"""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.text import read_documents

LENGTH = 64


def main(tokenizer_name: str, output: str, steps: str, *named: str) -> None:
    """Train, keep each domain's experts, save, load and generate."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    texts = dict(text.split("=", 1) for text in named)
    base = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    ffn = sp.SgatlinConfig(n_experts=256, n_channels=4, top_k=8, d_key=32)
    model = AutoModelForCausalLM.from_config(sp.SparsePathwaysConfig.from_base(base, ffn=ffn))
    print(f"{model.num_parameters():,} parameters, {ffn.flops(128):,} FLOPs per token and FFN")
    rows = []
    for text in texts.values():
        for document in read_documents(text).items:
            ids = tokenizer(document.text)["input_ids"]
            starts = range(0, len(ids) - 1, LENGTH)
            rows += [ids[start : start + LENGTH] for start in starts]
    settings = TrainingArguments(
        output, max_steps=int(steps), learning_rate=3e-3, report_to=[], save_strategy="no"
    )
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, settings, pad, train_dataset=[{"input_ids": row} for row in rows]).train()
    profile = sp.profile(model.eval(), tokenizer, texts, max_tokens=4096, max_length=LENGTH)
    model.set_pathways(sp.select(model, profile, experts=0.25))
    for domain in texts:
        print(f"{domain} keeps {model.pathways.expert_weights(domain):,} weights of experts")
    model.save_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    inputs = tokenizer("the", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, domain=domain, max_new_tokens=8)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
