"""The experts of one domain out of a checkpoint of all: room for them, and nothing else is read."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_sparse_pathways.ffn.expert_reduction import ReducedExperts
from hf_sparse_pathways.ffn.ranges import Excerpt
from hf_sparse_pathways.modeling.sources import find_expert_sources


def reserve_experts(
    model: nn.Module,
    layers: Sequence[ReducedExperts],
    read: Mapping[str, Any],
    config: Any,
    excerpts: dict[str, Excerpt],
) -> set[str]:
    """Reserve room for the kept experts alone; return the tensors of others, not to be read.

    A checkpoint has one tensor per expert, which are put together on the way, or packed ones,
    of which excerpts are added to those that there are, in place.

    Args:
        model: The model, without weights yet.
        layers: Its routed experts.
        read: Lazy tensors by name.
        config: Transformers' ``LoadStateDictConfig``.
        excerpts: Lazy excerpts by name.
    """
    single, together = find_expert_sources(model, list(read), config.weight_mapping or [])
    names = {id(p): n for n, p in model.state_dict(keep_vars=True).items()}
    unneeded: set[str] = set()
    for layer in layers:
        for holder, name, packing, runs in layer.parameters():
            whole = holder.get_parameter(name)
            known = names[id(whole)]
            found, numbered = single.get(known, []), together.get(known, {})
            same = len(found) == 1 and [*read[found[0]].get_shape()] == [*whole.shape]
            if not same and {*numbered} != {*range(packing.experts)}:
                continue  # converted in another way: cut afterwards
            if same:
                dtype = None if config.dtype_plan else whole.dtype
                excerpts[found[0]] = Excerpt(read[found[0]], 0, runs, dtype)
            for expert in (~layer.kept.keep).nonzero().flatten().tolist():
                unneeded |= {*numbered.get(expert, ())}
            layer.reserve(holder, name, packing, runs)
    return unneeded
