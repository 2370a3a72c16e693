"""Tiny models of sgatlin layers, their random pathways, and plain models restricted by hand."""

import copy
import math

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse_pathways as sp
from hf_sparse_pathways.modeling.replacement import find_layers
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway
from tests.architectures import LLAMA_LIKE
from tests.texts import documents, save_documents, tiny_tokenizer

CHANNELS, EXPERTS, TOP_K = 2, 16, 3
TEXTS = {name: documents(name, count=12) for name in ("code", "law")}
TOKENIZER = tiny_tokenizer()

FEW = ("--max-tokens", "400", "--max-length", "32")
"""Options of commands that profile."""


def make_sgatlin(router="product_dense", base=None):
    """Return a new model whose layers are large enough to be seen in the logits."""
    torch.manual_seed(0)
    ffn = sp.SgatlinConfig(
        n_experts=EXPERTS, n_channels=CHANNELS, top_k=TOP_K, d_key=8, router=router
    )
    config = sp.SparsePathwaysConfig.from_base(base or LlamaConfig(**LLAMA_LIKE), ffn=ffn)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in find_layers(model):
            layer.v.mul_(20.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def save_with_texts(model, folder):
    """Save a model and its domains' texts; return its place, and the options that name these."""
    model.save_pretrained(folder / "bare")
    TOKENIZER.save_pretrained(folder / "bare")
    texts = []
    for name in TEXTS:
        place = save_documents(folder / name, name, count=12, words=40)
        texts += ["--domain", f"{name}={place}"]
    return folder / "bare", texts


def random_pathways(model, names=("code", "law"), seed=0):
    """Return pathways that keep other experts of each channel, more of the second."""
    generator = torch.Generator().manual_seed(seed)
    base = BaseModel.of(model)

    def draw():
        keep = torch.zeros(CHANNELS, EXPERTS, dtype=torch.bool)
        for channel, own in enumerate(keep):
            own[torch.randperm(EXPERTS, generator=generator)[: 4 + 2 * channel]] = True
        return sp.KeptExperts(keep=keep.flatten())

    made = {name: Pathway(blocks=(), experts=tuple(draw() for _ in base.experts)) for name in names}
    return sp.Pathways(base=base, by_domain=made)


def restricted(model, pathway):
    """Return a model without pathways whose routers never see the removed experts."""
    plain = copy.deepcopy(model)
    for layer, kept in zip(find_layers(plain), pathway.experts, strict=True):
        _restrict(layer.router, kept.keep.view(CHANNELS, EXPERTS))
    return plain


def _restrict(router, keep):
    def route(x, removed=None):
        assert removed is None
        return router.all_scores(x).masked_fill(~keep, -math.inf).topk(TOP_K)

    router.forward = route
