"""What the benchmark of other engines stands on: the GGUF file, and the processes that decode."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import ctranslate2
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from tests.architectures import prompt
from tests.share.exports import sparse
from tests.texts import tiny_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", params=["with biases", "without"])
def plain(request, tmp_path_factory):
    """An exported Llama."""
    folder = tmp_path_factory.mktemp("engines") / "plain"
    model = sparse("llama", **({} if request.param == "with biases" else {"bias": None}))
    return sp.export(model, "code", folder, tokenizer=tiny_tokenizer("characters")).folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_has_all_of_a_checkpoint(dtype, plain, tmp_path):
    folder, file = tmp_path / "checkpoint", tmp_path / "model.gguf"
    AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).save_pretrained(folder)
    shutil.copy(plain / "tokenizer.json", folder)
    runpy.run_path(str(BENCHMARKS / "llama_gguf.py"))["write_gguf"](folder, file, "smollm")
    weights = {n: w.float() for n, w in load_file(folder / "model.safetensors").items()}
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert len(tensors) == len(weights)
    for index in range(3):
        for own, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            name = f"model.layers.{index}.mlp.{theirs}.bias"
            assert (name in weights) == (f"blk.{index}.ffn_{own}.bias" in tensors)
            if name in weights:
                assert np.array_equal(tensors[f"blk.{index}.ffn_{own}.bias"], weights[name])
    if any(name.endswith("proj.bias") for name in weights):
        return  # Transformers reads no biases from such a file
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (loaded(prompt()).logits - expected(prompt()).logits).abs().max() < 1e-5


def test_a_process_decodes_as_transformers(plain, tmp_path):
    ctranslate2.converters.TransformersConverter(str(plain)).convert(str(tmp_path / "engine"))
    asked = {"ids": prompt()[0].tolist(), "new_tokens": 8}
    command = [sys.executable, str(BENCHMARKS / "engine_worker.py"), "ctranslate2"]
    done = subprocess.run(
        [*command, str(tmp_path / "engine"), "1"],
        input=f"{json.dumps(asked)}\n" * 2,
        capture_output=True,
        text=True,
        check=True,
    )
    model = AutoModelForCausalLM.from_pretrained(plain)
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt()[:1], **length)[0, prompt().shape[1] :].tolist()
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["tokens"] for answer in answers] == [expected, expected]
    assert all(answer["seconds"] > 0 for answer in answers)
