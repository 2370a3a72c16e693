"""Models whose weights are sharded over processes compute pathways exactly, or refuse."""

import copy
import functools

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.executors import EXECUTORS
from tests.architectures import build, compensate, prompt, random_masks
from tests.clustered import clustered
from tests.grouped import grouped
from tests.skipping import skipping
from tests.texts import documents, tiny_tokenizer

IDS = prompt()
DOMAINS = ("code", None, ["law", None])
make = sp.SparsePathwaysForCausalLM.from_dense
load = functools.partial(AutoModelForCausalLM.from_pretrained, tp_plan="auto")


@torch.no_grad()
def assert_same_model(found, expected):
    for domain in DOMAINS:
        logits = [model(IDS, domain=domain).logits for model in (found, expected)]
        assert torch.allclose(*logits, atol=1e-4)
        tokens = [
            model.generate(IDS, domain=domain, max_new_tokens=4, do_sample=False)
            for model in (found, expected)
        ]
        assert torch.equal(*tokens)


def _saved(state, folder, architecture="llama"):
    """Save a model with every compensation; return it and where it lies."""
    dense = build(architecture)
    model = make(dense, compensate(dense, random_masks(dense)), executor="masked")
    if state.is_main_process:
        dense.save_pretrained(folder / architecture / "base")
        model.save_pretrained(folder / architecture)
    state.wait_for_everyone()
    return model, folder / architecture


def check_every_executor_is_exact(state, folder):
    """Gate and up apart, with biases, and fused."""
    for architecture in ("llama", "llama_biased", "phi3"):
        expected, place = _saved(state, folder, architecture)
        sharded = load(place)
        for executor in ("auto", *EXECUTORS) if architecture == "llama" else ("auto",):
            sharded.set_executor(executor)
            assert_same_model(sharded, expected)
            assert sharded.execution.executor == "masked"
            assert "sharded" in sharded.execution.reason or executor == "masked"


def check_neurons_that_do_not_split_evenly(state, folder):
    odd = build("llama")
    for layer in odd.model.layers:
        mlp = layer.mlp
        mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(32, 37, bias=False) for _ in range(2))
        mlp.down_proj = torch.nn.Linear(37, 32, bias=False)
    for parameter in odd.parameters():  # the same in every process
        torch.distributed.broadcast(parameter.data, 0)
    odd.config.intermediate_size = 37
    expected = make(odd, compensate(odd, random_masks(odd)), executor="masked")
    if state.is_main_process:
        expected.save_pretrained(folder / "odd")
    state.wait_for_everyone()
    assert_same_model(load(folder / "odd"), expected)


def check_neurons_that_differ_by_token(state, folder):
    """Clusters of tokens, skipped neurons, and groups of neurons."""
    dense = build("llama")
    plain = compensate(dense, random_masks(dense))
    made = {
        "clusters": clustered(dense, change_rows=False),
        "skipping": skipping(plain, IDS, dense, "code"),
        "groups": grouped(plain),
    }
    for name, pathways in made.items():
        expected = make(dense, pathways, executor="masked")
        if state.is_main_process:
            expected.save_pretrained(folder / name)
        state.wait_for_everyone()
        assert_same_model(load(folder / name), expected)


def check_other_ways_to_come_by_pathways(state, folder):
    expected, place = _saved(state, folder)
    from_base = sp.SparsePathwaysForCausalLM.from_pretrained
    assert_same_model(from_base(place / "base", pathways=place, tp_plan="auto"), expected)
    sharded = load(place)
    others = sp.Pathways.from_masks(expected.to_dense(), random_masks(expected, seed=3))
    sharded.set_pathways(others)
    expected.set_pathways(others)
    assert_same_model(sharded, expected)
    sharded.save_pretrained(folder / "again", is_main_process=state.is_main_process)
    state.wait_for_everyone()
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder / "again"), expected)


def check_evaluation_of_a_sharded_model(state, folder):
    """All processes have to run the same text, and so they do without ``accelerator``."""
    expected, place = _saved(state, folder)
    sharded, texts = load(place), {"code": documents("code")}
    rows = [
        sp.evaluate(model, tiny_tokenizer(), texts, max_tokens=300).rows
        for model in (sharded, expected)
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert mine.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
    with pytest.raises(sp.PathwaysError, match="sharded over 2 processes"):
        sp.evaluate(sharded, tiny_tokenizer(), texts, accelerator=state)


def check_what_cannot_work_is_refused(state, folder):
    expected, place = _saved(state, folder)
    sharded, dense = load(place), load(place / "base")
    paths, texts = expected.pathways, {"code": documents("code")}
    refusals = {
        "without gradients only": lambda: sharded(IDS, domain="code"),
        "from_pretrained": lambda: make(dense, paths),
        "tp_plan='auto'": sharded.to_dense,
        "save_pretrained": lambda: copy.deepcopy(sharded),
        "whole model": lambda: sp.profile(sharded, tiny_tokenizer(), texts),
        "on the whole": lambda: sp.profile(dense, tiny_tokenizer(), texts),
        "neurons cannot be": lambda: sp.Pathways.from_masks(dense, random_masks(expected)),
        "tensor parallelism": lambda: load(place, domain="code"),
    }
    for told, refused in refusals.items():
        with pytest.raises(sp.PathwaysError, match=told):
            refused()
    assert not sharded.prepare("code")


def check_a_plan_of_ones_own(state, folder):
    """A gathered activation is split again; of gate and up in stripes the rows are not known."""
    expected, place = _saved(state, folder)
    whole = {
        "layers.*.mlp.gate_proj": "colwise_gather_output",
        "layers.*.mlp.up_proj": "colwise_gather_output",
        "layers.*.mlp.down_proj": "rowwise_split_input",
    }
    names = {f"model.{name}": style for name, style in whole.items()}
    assert_same_model(load(place, tp_plan=names), expected)
    fused, place = _saved(state, folder, "phi3")
    packed = {
        "model.layers.*.mlp.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    striped = load(place, tp_plan=packed)
    with torch.no_grad():
        dense = [model(IDS, domain=None).logits for model in (striped, fused)]
        assert torch.allclose(*dense, atol=1e-4)
        with pytest.raises(sp.PathwaysError, match="sharded in a way"):
            striped(IDS, domain="code")


@torch.no_grad()
def check_fully_sharded(state, folder):
    """FSDP gathers weights before a leaf is called: masked, and exact."""
    expected, _ = _saved(state, folder)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    wrapped = copy.deepcopy(expected)
    for module in (*wrapped.model.layers, wrapped):
        fully_shard(module, mesh=mesh)
    for domain in DOMAINS:
        logits = [model(IDS, domain=domain).logits for model in (wrapped, expected)]
        assert torch.allclose(*logits, atol=1e-5)
    with pytest.raises(sp.PathwaysError, match="sharded"):
        wrapped.to_dense()
