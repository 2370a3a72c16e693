"""The main job on a real model and real text: build, reload in a fresh process, measure, generate.

Needs what ``demo/fetch.py`` puts into the cache folder; ``make test-real`` runs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp

pytestmark = pytest.mark.real

CACHE = Path(os.environ.get("CACHE", Path(__file__).parents[1] / ".cache"))
MODEL = CACHE / "smollm2-135m-instruct"
TEXTS = {name: CACHE / "texts" / name for name in ("code", "law", "medicine")}
OPTIONS = [part for name, path in TEXTS.items() for part in ("--domain", f"{name}={path}")]


def _command(*arguments):
    """Run the command line in a fresh process; return its standard output."""
    command = [sys.executable, "-m", "hf_sparse_pathways.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full checkpoint with three domains' pathways."""
    output = tmp_path_factory.mktemp("real") / "model"
    limits = ["--max-tokens", 6144, "--sparsity", 0.3]
    _command("build", MODEL, *OPTIONS, *limits, "--output", output)
    return output


def test_info(folder):
    facts = json.loads(_command("info", folder, "--json"))
    assert list(facts["domains"]) == list(TEXTS)
    assert len(facts["blocks"]) == 30
    for domain in facts["domains"].values():
        assert domain["sparsity"] == pytest.approx(0.3, abs=1e-3)
        assert domain["flops"] == pytest.approx(0.7, abs=1e-3)
        assert domain["text"]["tokens"] == 6144
        assert domain["text"]["documents"] > 5


def test_own_pathways_beat_their_partners_on_held_out_text(folder):
    limits = ["--max-tokens", 2048, "--json"]
    report = json.loads(_command("evaluate", folder, *OPTIONS, *limits))
    for domain in TEXTS:
        rows = [row for row in report["rows"] if row["domain"] == domain]
        assert all(row["excluded"] > 5 for row in rows)
        figures = {row["role"]: row["perplexity"] for row in rows if row["role"] != "other"}
        others = [row["perplexity"] for row in rows if row["role"] == "other"]
        own = figures["pathway"]
        assert figures["dense"] < own < 2 * figures["dense"]
        assert own < min(others)
        assert own < 1.1 * figures["pooled"]
        assert figures["random"] > 5 * own


def test_generation_in_a_fresh_process(folder):
    arguments = ["--prompt", "def fibonacci(n):\n", "--max-new-tokens", 12, "--json"]
    dense = json.loads(_command("generate", folder, *arguments, "--dense"))
    sparse = json.loads(_command("generate", folder, *arguments, "--domain", "code"))
    masked = json.loads(
        _command("generate", folder, *arguments, "--domain", "code", "--executor", "masked")
    )
    assert (dense["domain"], sparse["domain"]) == (None, "code")
    assert sparse["continuation"] == masked["continuation"]
    assert dense["continuation"].strip()


@torch.no_grad()
def test_reloaded_model_is_exact(folder):
    plain = AutoModelForCausalLM.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("This licence grants you the right to", return_tensors="pt")
    dense = plain(**inputs).logits
    assert torch.equal(model(**inputs).logits, dense)
    assert torch.equal(model.to_dense()(**inputs).logits, dense)
    for domain in TEXTS:
        compact = model(**inputs, domain=domain).logits
        model.set_executor("masked")
        masked = model(**inputs, domain=domain).logits
        model.set_executor("auto")
        assert torch.allclose(compact, masked, atol=1e-3)
        assert (compact - dense).abs().max() > 0.1
    adapter = sp.SparsePathwaysForCausalLM.from_pretrained(MODEL, pathways=folder)
    assert torch.equal(adapter(**inputs, domain="law").logits, model(**inputs, domain="law").logits)


def test_an_exported_domain_generates_what_its_pathway_does(folder, tmp_path):
    _command("export", folder, "--domain", "code", "--output", tmp_path / "code")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "code")
    assert type(plain).__name__ == "LlamaForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "code")("def main():", return_tensors="pt")
    length = {"max_new_tokens": 12, "do_sample": False}
    own = model.generate(**inputs, domain="code", **length)
    assert torch.equal(plain.generate(**inputs, **length), own)
