"""The benchmark of layers compares what it says it compares."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sgatlin

    yield sgatlin
    del sys.modules["sgatlin"]


def test_gathered_rows_give_the_same(benchmark):
    torch.manual_seed(0)
    mine, other = benchmark.make("sgatlin", 16), benchmark.make("gathered", 16)
    other.load_state_dict(mine.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_model", [128, 512])
def test_dense_has_equal_flops(benchmark, d_model):
    flops = {name: benchmark.make(name, d_model).flops for name in benchmark.NAMES}
    assert 0.97 < flops["swiglu"] / flops["sgatlin"] <= 1
    assert flops["peer"] <= flops["sgatlin"] == flops["gathered"]


def test_the_table(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    options = ["--d-model", "16", "--tokens", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["sgatlin.py", *options])
    monkeypatch.setattr(benchmark, "NAMES", ("sgatlin", "swiglu"))
    benchmark.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[2].startswith("| tokens | layer |")
    assert [line.split("|")[2].strip() for line in lines[4:]] == ["sgatlin", "swiglu"]
