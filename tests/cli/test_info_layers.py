"""``info`` of a model with FFN layers of its own."""

import json

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse_pathways as sp
from tests.architectures import LLAMA_LIKE
from tests.cli.commands import run
from tests.texts import tiny_tokenizer

FFN = sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    tokenizer = tiny_tokenizer()
    base = LlamaConfig(**{**LLAMA_LIKE, "vocab_size": len(tokenizer)})
    config = sp.SparsePathwaysConfig.from_base(base, ffn=FFN)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_info(folder):
    ran = run("info", folder)
    assert ran.status == 0, ran.err
    assert "llama with sgatlin layers as FFNs, no domains" in ran.out
    assert "n_experts: 16" in ran.out
    facts = json.loads(run("info", folder, "--json").out)
    assert facts["ffn"] == FFN.to_dict()


def test_generate(folder):
    ran = run("generate", folder, "--prompt", "the", "--max-new-tokens", 3)
    assert ran.status == 0, ran.err


@pytest.mark.parametrize(
    "command", [("generate", "--domain", "code", "--prompt", "x"), ("export", "--domain", "code")]
)
def test_what_needs_domains_says_why_there_are_none(folder, tmp_path, command):
    name, *options = command
    output = ["--output", tmp_path / "out"] if name == "export" else []
    ran = run(name, folder, *options, *output)
    assert ran.status == 1
    assert "sgatlin layers" in ran.err
