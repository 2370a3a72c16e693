"""The layers written down as their equations are, token by token and expert by expert."""

import torch
from torch.nn import functional


def sgatlin(layer, x):
    """``sum_c sum_i s_ci <u_ci, x> v_ci`` over the best of all scores."""
    output = torch.zeros_like(x)
    for t, token in enumerate(x):
        for c, scores in enumerate(layer.all_scores(x)[t]):
            for i in scores.argsort(descending=True)[: layer.config.top_k]:
                gated = scores[i] * (layer.u[c, i] @ token)
                if layer.config.activation == "gelu":
                    gated = functional.gelu(gated)
                output[t] += gated * layer.v[c, i]
    return output


def peer(layer, x):
    """``sum_h sum_i softmax(s_h)_i gelu(<u_i, x>) v_i``, softmax over the chosen."""
    output = torch.zeros_like(x)
    for t, token in enumerate(x):
        for scores in layer.router.all_scores(x)[t]:
            chosen = scores.argsort(descending=True)[: layer.config.top_k]
            for weight, i in zip(scores[chosen].softmax(0), chosen, strict=True):
                output[t] += weight * functional.gelu(layer.u[i] @ token) * layer.v[i]
    return output


def swiglu(layer, x):
    """``down(silu(gate x) * up x)``."""
    gate, up, down = layer.gate.weight, layer.up.weight, layer.down.weight
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mlp(layer, x):
    """``down(gelu(up x))``."""
    return functional.gelu(x @ layer.up.weight.T) @ layer.down.weight.T


def moe(layer, x):
    """Every expert for every token, weighed by a softmax over the chosen and zeros."""
    logits = x @ layer.router.weight.T
    hidden = logits.topk(layer.config.top_k).values[:, -1:] > logits
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    output = torch.zeros_like(x)
    for e in range(layer.config.n_experts):
        gate, up = layer.gate_up[e].chunk(2)
        made = (functional.silu(x @ gate.T) * (x @ up.T)) @ layer.down[e].T
        output += weights[:, e : e + 1] * made
    return output
