"""Whether a model is as it was: weights, classes, modes, hooks and what may be trained."""

import copy

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _structure(model):
    modules = [
        (
            type(module),
            module.training,
            sorted(set(module.__dict__) & {"forward", "state", "copies"}),
            [list(getattr(module, name)) for name in _HOOKS],
        )
        for module in model.modules()
    ]
    trained = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return modules, trained


def remember(model):
    """Return a function that asserts that the model is as it is now."""
    structure, weights = _structure(model), copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]

    def check():
        assert _structure(model) == structure
        state = model.state_dict()
        assert list(state) == list(weights)
        assert all(torch.equal(state[name], weights[name]) for name in weights)
        assert [parameter._version for parameter in model.parameters()] == versions
        assert torch.is_grad_enabled()

    return check
