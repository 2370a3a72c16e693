"""What a model is and computes, to see that nothing of it has changed."""

import copy

import torch

IDS = torch.arange(1, 9)[None]


@torch.no_grad()
def snapshot(model):
    """Return everything that pathways could change: weights, leaves, configuration, outputs."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "domains": list(model.domains),
        "pathways": model.pathways,
        "outputs": [model(IDS, domain=name).logits for name in (None, *model.domains)],
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name in ("classes", "config", "domains"):
        assert before[name] == after[name], name
    assert before["pathways"] is after["pathways"]
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    assert all(map(torch.equal, before["outputs"], after["outputs"]))
