"""A plain model that computes the prompt densely and what follows with what the prompt has used."""

import copy

import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, compensate, prompt, random_masks

IDS = prompt(3, 12)


def quiet(model):
    """Let a model generate as long as it is told to; return it."""
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def make_case():
    """Return a dense model, and the model with pathways of every compensation."""
    dense = quiet(build("llama"))
    paths = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="compact")
    model.set_prompt_pathways(rule="griffin")
    return dense, model


def griffin(dense, ids, sparsity=0.5):
    """Return a plain model that computes what follows one prompt as it should be."""
    return reference(dense, griffin_masks(dense, ids, sparsity), ids.shape[1])


def griffin_masks(model, ids, sparsity=0.5):
    """Return the neurons of each block with the largest shares of one prompt's activations."""
    seen = {}

    def keep_input(name):
        return lambda _, args: seen.__setitem__(name, args[0])

    blocks = find_blocks(model)
    handles = [b.outgoing.register_forward_pre_hook(keep_input(b.name)) for b in blocks]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    masks = []
    for block in blocks:
        values = seen[block.name].reshape(-1, block.d_ff)[-ids.shape[1] :].double()
        used = (values / values.norm(dim=1, keepdim=True)).square().sum(0)
        kept = used.topk(int(block.d_ff * (1 - sparsity) + 1e-6)).indices
        masks.append(torch.zeros(block.d_ff, dtype=torch.bool).index_fill(0, kept, True))
    return masks


def reference(model, masks, length, blocks=()):
    """Return a plain copy whose tokens from a place on have some neurons zeroed.

    If what a pathway keeps of each block is given, its refit and bias are added there.
    """
    result = copy.deepcopy(model)
    for block, part in zip(find_blocks(result), blocks, strict=False):
        block.outgoing.register_forward_hook(_repair(result, part, length))
    for block, keep in zip(find_blocks(result), masks, strict=True):

        def zero(_, args, keep=keep):
            values, tokens = args[0].clone(), result.tokens
            by_row = values.view(result.rows, -1, values.shape[-1])
            first = max(0, length - result.start)
            later = by_row[:, by_row.shape[1] - tokens + first :]
            later.masked_fill_(~keep, 0)
            return (values,)

        block.outgoing.register_forward_pre_hook(zero)

    def note(_, args, kwargs):
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if given is None else given
        result.rows, result.tokens = given.shape[:2]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        result.start = 0 if cache is None else int(cache.get_seq_length())

    result.register_forward_pre_hook(note, with_kwargs=True)
    return result


def _repair(model, part, length):
    def add(_, args, output):
        first, result = max(0, length - model.start), output.clone()
        later = result[:, first:]
        later += args[0][:, first:, part.keep] @ part.full_delta.T + part.bias.float()
        return result

    return add
