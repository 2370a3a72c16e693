"""What is timed: decoding with some batch, prefilling some tokens, and the FFN blocks alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse_pathways.errors import PathwaysError

KINDS = ("decode", "prefill", "ffn")
BATCHES = (1, 4, 8)
PREFILLS = (128, 512)
PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One thing that every arm does.

    Attributes:
        kind: ``"decode"`` is ``generate`` from its first new token on; ``"prefill"`` one forward
            pass without a cache and with logits of the last position; ``"ffn"`` the FFN blocks
            alone, called on the inputs that they get in such a pass.
        batch: Rows.
        tokens: Per row: of the prompt, or of the pass.

    Raises:
        PathwaysError: The kind is unknown, or a count is not positive.
    """

    kind: str
    batch: int = 1
    tokens: int = PROMPT_TOKENS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PathwaysError(f"A workload is one of {', '.join(KINDS)}, not {self.kind!r}.")
        if self.batch < 1 or self.tokens < 1:
            raise PathwaysError(
                f"A workload needs at least one row and token, got {self.batch} and {self.tokens}."
            )

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.kind == "decode":
            return f"decode, batch {self.batch}"
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        what = "prefill" if self.kind == "prefill" else "FFN blocks alone"
        return f"{what}, {self.tokens} tokens{rows}"

    @property
    def weight(self) -> float:
        """Its share of a budget, beside the others': one row is what most users decode."""
        if self.kind == "decode":
            return 3.0 if self.batch == 1 else 1.0
        return 1.0 if self.kind == "prefill" else 0.5


def plan_workloads(
    batches: Sequence[int] = BATCHES,
    prefills: Sequence[int] = PREFILLS,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
) -> tuple[Workload, ...]:
    """Return workloads for decode batches and prefill lengths, the FFN alone beside each prefill.

    Args:
        batches: Rows of ``generate``.
        prefills: Tokens of a forward pass.
        prompt_tokens: Of every prompt of ``generate``.

    Raises:
        PathwaysError: A number is not positive.
    """
    decodes = [Workload(kind="decode", batch=n, tokens=prompt_tokens) for n in batches]
    passes = [Workload(kind=kind, tokens=n) for n in prefills for kind in ("prefill", "ffn")]
    return tuple(dict.fromkeys([*decodes, *passes]))


def most_tokens(model: Any) -> int | None:
    """Return how many positions a model has; None if it says nothing."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return None


def check_positions(workload: Workload, new_tokens: int, positions: int | None) -> None:
    """Check that a workload fits into a model's positions.

    Args:
        workload: It.
        new_tokens: The least that ``generate`` will make.
        positions: The model's; None if unknown.

    Raises:
        PathwaysError: It does not.
    """
    needed = workload.tokens + (new_tokens if workload.kind == "decode" else 0)
    if positions is not None and needed > positions:
        raise PathwaysError(
            f"{workload.label} needs {needed} positions, and the model has {positions}. Ask for "
            "fewer tokens (--prefill, --prompt-tokens, --new-tokens)."
        )
