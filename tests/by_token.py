"""What tests of pathways that compute different neurons for different tokens have in common."""

import torch

import hf_sparse_pathways as sp
from tests.architectures import prompt, repaired
from tests.test_exactness import TOLERANCE

IDS = prompt(3, 9)


def make_model(dense, pathways):
    """Return a model of the pathways ``law`` and ``code``, whose copies all have room.

    The last one is that of different neurons: numbers from the end find it.
    """
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways.subset(["law", "code"]))
    model.max_resident_bytes = "1GB"
    return model


def difference(left, right):
    return (left - right).abs().max().item()


@torch.no_grad()
def expected_logits(dense, model, plain):
    """Return what each domain is to compute; ``plain`` is an oracle of ``code``."""
    return {
        "code": plain(IDS, use_cache=False).logits,
        "law": repaired(dense, model.pathways["law"])(IDS, use_cache=False).logits,
        None: dense(IDS).logits,
    }


@torch.no_grad()
def assert_computes(model, expected, rows=("law", "code", None)):
    """Every domain alone, and rows of different ones, are what is expected."""
    for domain, logits in expected.items():
        assert difference(model(IDS, domain=domain).logits, logits) <= 5 * TOLERANCE, domain
    mixed = model(IDS, domain=list(rows)).logits
    for row, domain in enumerate(rows):
        assert difference(mixed[row], expected[domain][row]) <= 5 * TOLERANCE, domain


@torch.no_grad()
def assert_computes_a_first_token(model, expected):
    """A row's first token alone is computed as in its text."""
    for domain, logits in expected.items():
        found = model(IDS[:1, :1], domain=domain).logits
        assert difference(found, logits[:1, :1]) <= 1e-3, domain
