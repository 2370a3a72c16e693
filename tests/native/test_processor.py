"""Which formats PyTorch only emulates, by what it tells of the processor."""

import pytest
import torch

from hf_sparse_pathways.native.processor import slow_dtypes


@pytest.mark.parametrize(
    ("known", "emulated"),
    [
        ({"architecture": "x86_64"}, {torch.bfloat16, torch.float16}),
        (
            {"architecture": "x86_64", "amx_fp16": True, "amx_bf16": False},
            {torch.bfloat16},
        ),
        ({"architecture": "x86_64", "avx512_bf16": True}, {torch.float16}),
        ({"architecture": "aarch64"}, set()),
        ({}, set()),
    ],
)
def test_what_is_emulated_is_told_by_the_processor(known, emulated, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert slow_dtypes() == emulated
