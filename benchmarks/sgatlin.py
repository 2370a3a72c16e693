"""Time and memory of sgatlin, with a quarter of its experts, its rows copied, beside other layers.

PEER and SwiGLU are as near to its FLOPs as their sizes allow, but not above.

    python benchmarks/sgatlin.py --d-model 256 1024 --tokens 1 64 4096

Arms take turns, and a figure is the median of the rounds; memory is what a process of its own needs
at most beyond layer and input, for one forward and backward pass. Nothing else should be running.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from publishing import Section, add_page
from torch import Tensor

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.figures import format_figure, markdown_table
from hf_sparse_pathways.sgatlin.kinds import make_layer

SECTION = Section("sgatlin", "benchmark-sgatlin")

HEADER = ["tokens", "layer", "FLOPs per token", "forward", "with backward", "memory"]
SECONDS = 0.2
"""Least time of a round."""


class Gathered(sp.SgatlinFFN):
    """sgatlin as it is written down: every token's rows are copied."""

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row."""
        scores, index = self.route(x)
        channel = torch.arange(self.config.n_channels)[:, None]
        u, v = self.u[channel, index], self.v[channel, index]
        return torch.einsum("tck,td,tckd,tcke->te", scores, x, u, v)


class Quarter(sp.SgatlinFFN):
    """sgatlin as a domain computes it that keeps a quarter of each channel's experts."""

    def __init__(self, config: sp.SgatlinConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        drawn = torch.rand(config.n_channels, config.n_experts).argsort(1)
        self._removed = drawn >= config.n_experts // 4

    def removed(self, h: Tensor) -> Tensor:  # noqa: ARG002
        """Return which experts tokens may not get."""
        return self._removed


def make(name: str, d_model: int) -> Any:
    """Return a new layer of about the FLOPs that sgatlin has with its usual settings."""
    config = sp.SgatlinConfig()
    if name in SGATLIN:
        return SGATLIN[name](config, d_model)
    flops = config.flops(d_model)
    heads = max(1, flops // sp.PeerConfig(n_heads=1).flops(d_model))
    configs = {
        "peer": sp.PeerConfig(n_heads=heads),
        "swiglu": sp.SwigluConfig(d_ff=max(1, flops // (6 * d_model))),
    }
    return make_layer(configs[name], d_model)


SGATLIN = {"sgatlin": sp.SgatlinFFN, "a quarter kept": Quarter, "gathered": Gathered}

NAMES = (*SGATLIN, "peer", "swiglu")


def main() -> None:
    """Measure, and write a table per width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # of one arm, in a process
    add_page(parser)
    given = parser.parse_args()
    if given.memory:
        name, d_model, tokens = given.memory
        print(measure_memory(name, int(d_model), int(tokens)))
        return
    tables = []
    for d_model in given.d_model:
        rows = [row for tokens in given.tokens for row in compare(d_model, tokens, given.rounds)]
        threads = torch.get_num_threads()
        caption = f"d_model {d_model}, float32, {threads} CPU thread(s); microseconds per token"
        tables.append(f"{caption}\n\n{markdown_table(HEADER, rows)}")
    SECTION.publish("\n\n".join(tables), given.page)


def compare(d_model: int, tokens: int, rounds: int) -> list[list[str]]:
    """Return a row per layer."""
    torch.manual_seed(0)
    layers = {name: make(name, d_model) for name in NAMES}
    x = torch.randn(tokens, d_model)

    def forward(layer: Any) -> None:
        with torch.no_grad():
            layer(x)

    def train(layer: Any) -> None:
        layer(x).sum().backward()

    times = [time_alternating(layers, call, rounds) for call in (forward, train)]
    rows = []
    for name, layer in layers.items():
        command = [sys.executable, __file__, "--memory", name, str(d_model), str(tokens)]
        memory = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        figures = [format_figure(own[name] / tokens * 1e6) for own in times]
        rows.append([str(tokens), name, f"{layer.flops:,}", *figures, f"{memory / 1e6:.0f} MB"])
    return rows


def time_alternating(
    layers: dict[str, Any], call: Callable[[Any], None], rounds: int
) -> dict[str, float]:
    """Return the median seconds of a call per layer, the layers taking turns."""
    repeats = {}
    for name, layer in layers.items():
        call(layer)
        start = time.perf_counter()
        call(layer)
        repeats[name] = max(1, int(SECONDS / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call(layer)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(own) for name, own in seconds.items()}


def measure_memory(name: str, d_model: int, tokens: int) -> int:
    """Return the bytes that a forward and backward pass needs beyond layer and input."""
    layer, x = make(name, d_model), torch.randn(tokens, d_model)
    make_layer(sp.SwigluConfig(d_ff=8), d_model)(x[:1]).sum().backward()  # libraries are loaded
    before = _start()
    layer(x).sum().backward()
    return _memory("VmHWM") - before


def _start() -> int:
    """Forget the most memory that making the layer took, and return what is in use; Linux.

    What was given back to the allocator has to go, or it would be used again and not be seen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """Return a figure of this process; ``ru_maxrss`` has the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
