"""Configurations of FFN layers: what they refuse, how they are saved, what they say of FLOPs."""

import json
from dataclasses import FrozenInstanceError

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError, UnknownNameError
from hf_sparse_pathways.sgatlin.settings import read_ffn
from tests.sgatlin.cases import CONFIGS


def test_defaults_are_the_paper_s():
    config = sp.SgatlinConfig()
    assert (config.n_experts, config.n_channels, config.top_k) == (1024, 8, 8)
    assert (config.d_key, config.router) == (128, "product_dense")
    with pytest.raises(FrozenInstanceError):
        config.top_k = 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sp.SgatlinConfig(n_experts=1000), r"1000 is none. Take 961 or 1024"),
        (lambda: sp.PeerConfig(n_experts=1000), r"square"),
        (lambda: sp.SgatlinConfig(n_experts=16, top_k=5), r"top_k=5 is too large.*4 or less"),
        (lambda: sp.SgatlinConfig(n_experts=5, top_k=6, router="dense"), "more than the 5 experts"),
        (lambda: sp.MoeConfig(d_ff=4, n_experts=2, top_k=3), "more than the 2 experts"),
        (lambda: sp.SgatlinConfig(top_k=0), "integer from 1"),
        (lambda: sp.SgatlinConfig(n_channels=2.0), "n_channels"),
        (lambda: sp.SgatlinConfig(d_key=True), "d_key"),
        (lambda: sp.SwigluConfig(d_ff=-3), "d_ff, got -3"),
        (lambda: sp.SwigluConfig(d_ff=1 << 40), "d_ff"),
        (lambda: sp.MoeConfig(d_ff=4, z_loss=-1.0), "z_loss"),
        (lambda: sp.MoeConfig(d_ff=4, load_balancing=float("nan")), "load_balancing"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(sp.PathwaysError, match=message):
        make()


def test_unknown_names_are_told():
    with pytest.raises(UnknownNameError, match="Did you mean 'product_dense'"):
        sp.SgatlinConfig(router="product-dense")
    with pytest.raises(UnknownNameError, match="Did you mean 'gelu'"):
        sp.MlpConfig(d_ff=3, activation="gelo")


def test_the_dense_router_takes_any_number_of_experts():
    assert sp.SgatlinConfig(n_experts=1000, router="dense").n_experts == 1000


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_read_again(name):
    saved = json.loads(json.dumps(CONFIGS[name].to_dict()))
    assert read_ffn(saved) == CONFIGS[name]


@pytest.mark.parametrize(
    "saved",
    [
        None,
        "sgatlin",
        [],
        {},
        {"kind": "sgatlin9"},
        {"kind": ["sgatlin"]},
        {"kind": "sgatlin", "n_expert": 4},
        {"kind": "sgatlin", "n_experts": "4"},
        {"kind": "sgatlin", "router": 3},
        {"kind": "sgatlin", "router": ["dense"]},
        {"kind": "swiglu"},
        {"kind": "mlp", "d_ff": 4, "activation": "__import__"},
        {"kind": "moe", "d_ff": 4, "z_loss": "1"},
    ],
)
def test_a_damaged_one_is_refused(saved):
    with pytest.raises(ArtefactError, match=r"config\.json has ffn"):
        read_ffn(saved)
