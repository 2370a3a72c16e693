"""What is pushed, and what lies in the repository afterwards."""

import torch

import hf_sparse_pathways as sp
from tests.architectures import build, compensate, random_masks

REPO = "me/x"


def make_pathways(domains=("code", "law"), seed=0):
    dense = build("llama")
    return compensate(dense, random_masks(dense, domains, seed=seed))


def make_model(**options):
    return sp.SparsePathwaysForCausalLM.from_dense(build("llama"), make_pathways(), **options)


def assert_same(found, expected):
    assert found.base == expected.base
    assert found.domains == expected.domains
    assert list(found.controls) == list(expected.controls)
    for name in (*found.domains, *found.controls):
        assert found[name].provenance == expected[name].provenance
        for mine, theirs in zip(found[name].blocks, expected[name].blocks, strict=True):
            assert mine.parts().keys() == theirs.parts().keys()
            assert all(map(torch.equal, mine.parts().values(), theirs.parts().values()))


def files_of(hub, revision="main"):
    return hub.repos[REPO].at(revision).files


def uploads_of_weights(hub):
    return [
        place for place, _ in hub.uploaded if place == files_of(hub)["model.safetensors"].sha256
    ]
