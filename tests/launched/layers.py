"""Models with FFN layers of their own are trained by several processes as by one."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse_pathways as sp
from tests.architectures import LLAMA_LIKE, prompt

ROWS = prompt(8, 9, seed=4)


def _make(ffn):
    torch.manual_seed(0)
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), ffn=ffn)
    return AutoModelForCausalLM.from_config(config).train()


def _step(model, optimizer, rows, backward):
    for batch in rows:
        optimizer.zero_grad()
        backward(model(batch, labels=batch).loss)
        optimizer.step()


def _train_together(ffn):
    accelerator, model = Accelerator(cpu=True), _make(ffn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(ROWS, batch_size=2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    _step(prepared, optimizer, loader, accelerator.backward)
    return accelerator.unwrap_model(prepared)


def check_training(_state, _folder):
    for ffn in (
        sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8),
        sp.PeerConfig(n_experts=16, n_heads=2, top_k=3, d_key=8),
    ):
        alone = _make(ffn)
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        _step(alone, optimizer, ROWS.split(4), torch.Tensor.backward)
        found = _train_together(ffn).state_dict()
        before = _make(ffn).state_dict()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
            assert not torch.equal(value, before[name]), name


def check_a_mixture_trains(_state, _folder):
    """Experts that no token of a process gets have gradients all the same: none is waited for."""
    _train_together(sp.MoeConfig(n_experts=8, top_k=1, d_ff=4))
