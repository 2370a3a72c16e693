"""What one process knows of others; tests/launched has several."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

import hf_sparse_pathways as sp
from hf_sparse_pathways.processes import ALONE, Processes
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer


def test_alone_everything_is_its_own():
    assert Processes.of(None) == ALONE
    assert Processes.of(PartialState(cpu=True)).count == 1
    tensor = torch.arange(3)
    assert ALONE.is_first
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.add_up(tensor) is ALONE.largest(tensor) is tensor
    assert ALONE.gather("a") == ["a"]


def test_every_item_is_shared_once():
    shares = [Processes(index, 3).share(range(8)) for index in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))


def test_no_accelerator():
    with pytest.raises(sp.PathwaysError, match=r"accelerator=2 does not fit.*PartialState"):
        sp.profile(build("llama"), tiny_tokenizer(), {"code": documents("code")}, accelerator=2)


def test_processes_that_cannot_talk():
    cut_off = SimpleNamespace(process_index=0, num_processes=2, device=torch.device("cpu"))
    with pytest.raises(sp.PathwaysError, match="torchrun"):
        Processes.of(cut_off)
