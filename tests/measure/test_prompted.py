"""Arms that pick neurons from the first part of a window: one pass gives what a generation does."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.measure.peers import PEERS
from hf_sparse_pathways.measure.prompted import PROMPTED, prompt_arm
from tests.architectures import build, prompt, random_masks

LENGTHS = (24, 20, 17)
WINDOWS = tuple(
    Window(tuple(row[:length]))
    for row, length in zip(prompt(3, 24).tolist(), (24, 20, 17), strict=True)
)
CONTEXT = 0.5


def _model(dense, **settings):
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.set_prompt_pathways(**settings)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
@torch.no_grad()
def test_griffin_is_what_griffins_own_arm_computes(architecture):
    dense = build(architecture)
    model, batch = _model(dense, rule="griffin"), next(make_batches(WINDOWS, 3))
    found = prompt_arm("prompt", "code", model.pathways, 0.5, CONTEXT).forward(model, batch)
    expected = PEERS["griffin"](dense, WINDOWS, 0.5, CONTEXT).forward(dense, batch)
    assert torch.allclose(found[batch.mask], expected[batch.mask], atol=1e-5)


@pytest.mark.parametrize("method", PROMPTED)
@torch.no_grad()
def test_one_pass_gives_what_a_loop_of_passes_does(method):
    dense = build("llama")
    model, batch = _model(dense, rule="refit"), next(make_batches(WINDOWS, 3))
    arm = prompt_arm(method, "code", model.pathways, 0.5, CONTEXT)
    found = arm.forward(model, batch)
    for row, window in enumerate(WINDOWS):
        ids, half = torch.tensor([window.ids]), len(window.ids) // 2
        named = "prompt" if method == "prompt" else "prompt:code"
        first = model(ids[:, :half], domain=named, use_cache=True)
        rest = model(ids[:, half:], domain=first.picked, cache=first.past_key_values)
        whole = torch.cat([first.logits, rest.logits], dim=1)[0]
        assert torch.allclose(found[row, : len(whole)], whole, atol=1e-4)
    assert arm.flops == pytest.approx(0.5, abs=0.1)
