"""Which class computes which configuration."""

from collections.abc import Mapping
from typing import Any

from hf_sparse_pathways.sgatlin.dense import MlpFFN, SwigluFFN
from hf_sparse_pathways.sgatlin.layer import FfnLayer
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN
from hf_sparse_pathways.sgatlin.mixture import MoeFFN
from hf_sparse_pathways.sgatlin.peer import PeerFFN
from hf_sparse_pathways.sgatlin.settings import FfnConfig

_LAYERS: Mapping[type[FfnConfig], Any] = {
    layer.config_class: layer for layer in (SgatlinFFN, PeerFFN, SwigluFFN, MlpFFN, MoeFFN)
}


def make_layer(config: FfnConfig, d_model: int) -> FfnLayer:
    """Return a new layer of a configuration."""
    return _LAYERS[type(config)](config, d_model)
