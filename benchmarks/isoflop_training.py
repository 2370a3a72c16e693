"""One run of ``isoflop.py``: a small decoder on bytes, with one kind of FFN layer, for some FLOPs.

All kinds have the same FLOPs per token (as near as their sizes allow), so a budget is about as many
tokens for each. A training step counts as three forward passes.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, get_cosine_schedule_with_warmup

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import TextError
from hf_sparse_pathways.sgatlin.flops import count_flops

KINDS = ("sgatlin", "sgatlin-gelu", "peer", "swiglu", "mlp", "moe")
PASSES = 3
"""Forward passes that forward and backward together are worth."""

CLIP, WARMUP, DECAY = 1.0, 0.1, 1e-4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the models of all kinds have in common.

    Attributes:
        d_model: Width.
        layers: Decoder layers.
        length: Bytes of a window.
        batch: Windows of a step.
        n_experts: Of sgatlin's channels, and of PEER's pool.
        d_key: Of both.
    """

    d_model: int = 128
    layers: int = 4
    length: int = 128
    batch: int = 8
    n_experts: int = 1024
    d_key: int = 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        kind: One of ``KINDS``.
        flops: Most FLOPs of its training.
        seed: Of weights and windows.
        learning_rate: The highest of its schedule.
        shape: Of the model.
    """

    kind: str
    flops: float
    seed: int
    learning_rate: float
    shape: Shape

    @property
    def name(self) -> str:
        """What its file is called."""
        own = asdict(self.shape).values()
        shape = "-".join(map(str, own))
        return f"{self.kind}-{self.flops!r}-{self.seed}-{self.learning_rate!r}-{shape}"


class Text:
    """Bytes to train on, to choose a learning rate by, and to measure with: of other documents."""

    def __init__(self, train: bytes, validation: bytes, test: bytes) -> None:
        self._parts = {"train": train, "validation": validation, "test": test}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Part -> int64 bytes."""
        return {
            name: torch.frombuffer(bytearray(part), dtype=torch.uint8).long()
            for name, part in self._parts.items()
        }

    @cached_property
    def digest(self) -> str:
        """What tells this text from others."""
        parts = (hashlib.sha256(part).digest() for part in self._parts.values())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:12]

    def check(self, length: int) -> None:
        """Check that every part has more than a window.

        Raises:
            TextError: One has not.
        """
        for name, part in self._parts.items():
            if len(part) <= length:
                raise TextError(
                    f"The text has {len(part)} bytes for {name}, and a window takes {length}: give "
                    "more documents, or a smaller --length."
                )

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Return random windows to train on, ``(batch, length)``."""
        text = self.tensors["train"]
        most = len(text) - shape.length
        starts = torch.randint(0, most, (shape.batch,), generator=generator)
        return torch.stack([text[start : start + shape.length] for start in starts.tolist()])

    def windows(self, part: str, shape: Shape, most: int) -> Tensor:
        """Return the first windows of a part, ``(windows, length)``, of at most so many bytes."""
        text = self.tensors[part][:most]
        return text[: len(text) // shape.length * shape.length].view(-1, shape.length)


def make_ffn(kind: str, shape: Shape) -> Any:
    """Return the largest layer of a kind with no more FLOPs than a SwiGLU of 8/3 d_model."""
    most, d_model = 16 * shape.d_model**2, shape.d_model
    keys = {"n_experts": shape.n_experts, "d_key": shape.d_key}
    made = {
        "sgatlin": lambda size: sp.SgatlinConfig(n_channels=size, **keys),
        "sgatlin-gelu": lambda size: sp.SgatlinConfig(n_channels=size, activation="gelu", **keys),
        "peer": lambda size: sp.PeerConfig(n_heads=size, **keys),
        "swiglu": lambda size: sp.SwigluConfig(d_ff=size),
        "mlp": lambda size: sp.MlpConfig(d_ff=size),
        "moe": lambda size: sp.MoeConfig(d_ff=size, n_experts=8, top_k=2),
    }[kind]
    size = 1
    while made(size + 1).flops(d_model) <= most:
        size += 1
    return made(size)


def make_model(ffn: Any, shape: Shape, seed: int) -> Any:
    """Return a new decoder over bytes."""
    heads = max(1, shape.d_model // 32)
    base = LlamaConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=1,  # replaced by the layers
        vocab_size=256,
        max_position_embeddings=shape.length,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(sp.SparsePathwaysConfig.from_base(base, ffn=ffn))


def train(run: Run, text: Text, scored: int) -> dict[str, Any]:
    """Train a model and measure it.

    Args:
        run: How.
        text: On what.
        scored: Bytes of each held-out part that are scored.

    Returns:
        The run and what came of it, as JSON values: loss in nats per byte.
    """
    shape, ffn = run.shape, make_ffn(run.kind, run.shape)
    model = make_model(ffn, shape, run.seed).train()
    per_token = count_flops(model, shape.length)
    step_flops = PASSES * per_token * shape.batch * shape.length
    steps = max(1, int(run.flops // step_flops))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, weight_decay=DECAY, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, int(WARMUP * steps)), steps)
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(steps):
        windows = text.draw(shape, generator)
        model(windows, labels=windows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    parts = ("validation", "test")
    losses = {part: score(model, text.windows(part, shape, scored)) for part in parts}
    return {
        **asdict(replace(run, flops=steps * step_flops)),
        "ffn": ffn.to_dict(),
        "budget": run.flops,
        "tokens": steps * shape.batch * shape.length,
        "forward_flops_per_token": per_token,
        "parameters": model.num_parameters(),
        **losses,
    }


@torch.no_grad()
def score(model: Any, windows: Tensor) -> float:
    """Return the mean loss of windows, nats per byte."""
    model.eval()
    losses = [float(model(batch, labels=batch).loss) * len(batch) for batch in windows.split(16)]
    return sum(losses) / len(windows)
