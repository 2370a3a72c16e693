"""How much memory copies of weights really take."""

import torch

from hf_sparse_pathways.ffn.packing import Packed


def copied_bytes(model):
    """What lies in memory beside the weights, whatever the books say."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    attachment = model._attachment
    leaves = [leaf for block in attachment.blocks for leaf in block.leaves.values()]
    storages, packed = {}, 0
    for kept in [
        k for leaf in (*leaves, *attachment.copies.rest.leaves) for k in leaf.copies.values()
    ]:
        thin = [] if kept.bypass is None else [kept.bypass.outer, kept.bypass.inner]
        is_packed = isinstance(kept.product, Packed)
        packed += torch.ops.mkldnn._nbytes(kept.product.weight) if is_packed else 0
        plain = [] if is_packed else [kept.product.weight, getattr(kept.product, "rows", None)]
        for tensor in (*plain, kept.bias, *thin):
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return packed + sum(size for place, size in storages.items() if place not in weights)
