"""A small layer of every kind."""

import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.sgatlin.kinds import make_layer

D_MODEL = 12
SGATLIN = {
    router: sp.SgatlinConfig(n_experts=25, n_channels=3, top_k=4, d_key=6, router=router)
    for router in ("product_dense", "product_key", "dense")
}
CONFIGS = {
    **{f"sgatlin-{router}": config for router, config in SGATLIN.items()},
    "sgatlin-odd": sp.SgatlinConfig(n_experts=7, n_channels=1, top_k=7, d_key=1, router="dense"),
    "sgatlin-all": sp.SgatlinConfig(n_experts=9, n_channels=2, top_k=3, d_key=5),
    "sgatlin-gelu": sp.SgatlinConfig(
        n_experts=9, n_channels=2, top_k=3, d_key=5, activation="gelu"
    ),
    "peer": sp.PeerConfig(n_experts=16, n_heads=3, top_k=3, d_key=5),
    "swiglu": sp.SwigluConfig(d_ff=20),
    "mlp": sp.MlpConfig(d_ff=20),
    "moe": sp.MoeConfig(n_experts=5, top_k=2, d_ff=6),
}


def layer_of(name, dtype=torch.float64, seed=0):
    """Return a layer of a case, and an input of seven tokens."""
    torch.manual_seed(seed)
    layer = make_layer(CONFIGS[name], D_MODEL).to(dtype)
    return layer, torch.randn(7, D_MODEL, dtype=dtype)
