"""Tiny models with compensated pathways, texts, and settings under which a run takes a second."""

import torch
from transformers import BitNetConfig, BitNetForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.healing.batches import draw_text
from hf_sparse_pathways.healing.losses import Objective
from hf_sparse_pathways.healing.students import frozen_copy, make_student
from tests.architectures import LLAMA_LIKE, build, compensate, random_masks
from tests.texts import documents, tiny_tokenizer

ARCHITECTURES = ("llama", "llama_biased", "gpt2", "phi3", "gemma3", "opt")
ENTANGLED = "bitnet"
QUICK = {
    "steps": 6,
    "batch_size": 2,
    "accumulate": 1,
    "rank": 4,
    "learning_rate": 5e-3,
    "validations": 3,
    "patience": 9,
    "precision": "model",
}
TEXTS = documents("code", count=30)


def sparse(name="llama", *, compensated=True):
    """Return a tiny model with pathways for code and law."""
    dense = bitnet() if name == ENTANGLED else build(name)
    masks = random_masks(dense)
    paths = compensate(dense, masks) if compensated else sp.Pathways.from_masks(dense, masks)
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths).eval()


def bitnet():
    """Return a tiny model with a norm over all neurons of a block."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(BitNetConfig(**LLAMA_LIKE)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def heal(model, texts=None, work_folder=None, **settings):
    chosen = sp.HealingSettings(**{**QUICK, **settings})
    source = {"code": TEXTS} if texts is None else texts
    return sp.heal(model, tiny_tokenizer(), source, settings=chosen, work_folder=work_folder)


def student(model, domain="code"):
    """Return a pathway's student, and the frozen model that it was made from."""
    frozen = frozen_copy(model.to_dense(), torch.device("cpu"))
    return make_student(frozen, model.pathways[domain].blocks), frozen


def text(**settings):
    chosen = sp.HealingSettings(**{**QUICK, **settings})
    read = read_documents(TEXTS)
    return draw_text("code", read, {}, tiny_tokenizer(), chosen, 128)


def parts(pathways, domain="code"):
    """Return all tensors of a pathway by name."""
    return {
        f"{index}.{name}": tensor
        for index, block in enumerate(pathways[domain].blocks)
        for name, tensor in block.parts().items()
    }


def same(first, second):
    """Whether two pathways hold the same tensors, bit for bit."""
    mine, theirs = parts(first), parts(second)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def watch_batches(monkeypatch):
    """Record the batches that each model is trained on, and its teacher."""
    seen = {}
    call = Objective.__call__

    def watch(self, model, batch):
        record = seen.setdefault(id(model), {"batches": [], "model": model, "objective": self})
        record["batches"].append(tuple(window.ids for window in batch.windows))
        return call(self, model, batch)

    monkeypatch.setattr(Objective, "__call__", watch)
    return seen
