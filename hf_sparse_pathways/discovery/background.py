"""What a model writes by itself: the text that a domain's text is told from.

Short texts that begin with a token drawn at random are continued by the model, and its predictions
are averaged into the likelihood of each token. So text of domains that nobody has given has its
place, and none of it has to be read. A part is the order of the vocabulary: in byte-pair tokens it
goes by frequency, also in languages that the model does not begin by itself.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from hf_sparse_pathways.discovery.passes import evaluation_mode, find_device
from hf_sparse_pathways.discovery.resumption import digest_plan
from hf_sparse_pathways.discovery.weights import weight_digest
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.files import write_atomically
from hf_sparse_pathways.limits import MOST_FRAME, MOST_WIDTH
from hf_sparse_pathways.tensor_files import open_tensors

ROWS = 256
"""Texts that are begun."""

TOKENS = 8
"""Tokens of each."""

BATCH = 64
"""Texts that are written at a time."""

VOCABULARY_SHARE = 0.1
"""Part of the likelihoods that goes by the tokens' order in the vocabulary."""

ORDER_OFFSET = 200.0
"""A token's likelihood by its order is one over its place plus this: the first ones are bytes."""

PARTS = ("probabilities", "samples", "ignored", "prefix", "suffix")


@dataclass(frozen=True, kw_only=True, eq=False)
class Background:
    """What a model writes, and what belongs to the frame of a prompt.

    Attributes:
        probabilities: Likelihood of each token, float32 ``(vocabulary,)``.
        samples: What was written, int32 ``(texts, tokens)``.
        ignored: int32 ids of special tokens.
        prefix: int32 ids with which the chat template begins a prompt.
        suffix: int32 ids with which it ends one.
    """

    probabilities: Tensor
    samples: Tensor
    ignored: Tensor
    prefix: Tensor
    suffix: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in PARTS}

    def check(self) -> None:
        """Check what was read from a file.

        Raises:
            ArtefactError: It is no background.
        """
        likely, written = self.probabilities, self.samples
        whole = likely.dim() == 1 and 0 < len(likely) <= MOST_WIDTH and written.dim() == 2
        ids = [written, self.ignored, self.prefix, self.suffix]
        whole = whole and all(part.dtype == torch.int32 for part in ids)
        whole = whole and all(part.dim() == 1 and len(part) <= MOST_FRAME for part in ids[1:])
        if not whole or likely.dtype != torch.float32 or not bool((likely > 0).all()):
            raise ArtefactError("The profile's background has other tensors than it has to have.")
        if bool((written < 0).any()) or bool((written >= len(likely)).any()):
            raise ArtefactError("The profile's background holds ids outside of its vocabulary.")


def take_background(
    model: nn.Module,
    tokenizer: Any,
    *,
    seed: int,
    precision: str,
    work_folder: "str | os.PathLike[str] | None",
) -> Background | None:
    """Let a model write, or read what it wrote in an earlier run with the same settings.

    Args:
        model: As in ``write_background``.
        tokenizer: As there.
        seed: As there.
        precision: Of the model's products.
        work_folder: Where it is stored; None for nowhere.

    Raises:
        ArtefactError: What is stored is damaged.
    """
    if work_folder is None:
        return write_background(model, tokenizer, seed=seed)
    plan = {
        "weights": weight_digest(model),
        "vocabulary": len(tokenizer),
        "special": sorted({*getattr(tokenizer, "all_special_ids", ())}),
        "frame": find_frame(tokenizer),
        "precision": precision,
        "seed": seed,
    }
    path = Path(work_folder, f"background-{digest_plan(plan)}.safetensors")
    if path.is_file():
        return _read(path)
    written = write_background(model, tokenizer, seed=seed)
    if written is not None:
        write_atomically(path, save(written.parts()))
    return written


def _read(path: Path) -> Background:
    try:
        with open_tensors(path) as file:
            if {*file.header} != {*PARTS}:
                raise ArtefactError(f"it holds {sorted(file.header)}")
            found = Background(**file.read(PARTS))
        found.check()
    except ArtefactError as error:
        raise ArtefactError(f"{path} is damaged ({error}). Delete it to begin anew.") from error
    return found


def write_background(model: nn.Module, tokenizer: Any, *, seed: int) -> Background | None:
    """Let a model write; None if it cannot. The model is left as it was.

    Args:
        model: A causal LM; one with pathways writes densely.
        tokenizer: Its tokenizer.
        seed: Of what is drawn.
    """
    if not callable(getattr(model, "generate", None)):
        return None
    special = sorted({*getattr(tokenizer, "all_special_ids", ())})
    writing = _Writing(seed)
    device = find_device(model)
    texts: list[Tensor] = []
    with torch.no_grad(), all_dense(), evaluation_mode(model), _without_defaults(model):
        for ids in torch.split(writing.draw_first(len(tokenizer), special), BATCH):
            texts.append(_continue(model, ids.to(device), writing).cpu())
    likely = writing.average()
    prefix, suffix = find_frame(tokenizer)
    return Background(
        probabilities=_smooth(likely),
        samples=torch.cat(texts).clamp_max(len(likely) - 1).int(),
        ignored=torch.tensor(special, dtype=torch.int32),
        prefix=torch.tensor(prefix, dtype=torch.int32),
        suffix=torch.tensor(suffix, dtype=torch.int32),
    )


class _Writing(LogitsProcessor):
    """Draws the next tokens, and adds up the predictions that they are drawn from.

    What is drawn is handed on as the only token that is possible, so that nothing else is drawn.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._sum: Tensor | None = None

    def draw_first(self, vocabulary: int, special: Sequence[int]) -> Tensor:
        """Draw tokens to begin with, int64 ``(ROWS, 1)``, none of them special."""
        allowed = torch.ones(vocabulary)
        allowed[[index for index in special if index < vocabulary]] = 0.0
        if not bool(allowed.any()):
            allowed[:] = 1.0
        return allowed.multinomial(ROWS, replacement=True, generator=self._generator)[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Draw the tokens of a step."""
        likely = scores.float().softmax(-1).cpu()
        step = likely.sum(0, dtype=torch.float64)
        self._sum = step if self._sum is None else self._sum + step
        reached = likely.cumsum(-1)
        share = torch.rand(len(likely), 1, generator=self._generator) * reached[:, -1:]
        drawn = torch.searchsorted(reached, share).clamp_max(likely.shape[1] - 1)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, drawn.to(scores.device), 0.0)

    def average(self) -> Tensor:
        """Return the mean prediction, float64 ``(vocabulary,)``."""
        assert self._sum is not None  # at least one step was taken
        return self._sum / self._sum.sum()


def _continue(model: Any, ids: Tensor, writing: _Writing) -> Tensor:
    """Write on, ``(texts, TOKENS)``."""
    new = TOKENS - ids.shape[1]
    made: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
        ),
        logits_processor=[writing],
    )
    return made


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Within the block nothing of the model's own generation settings is added to those given."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _smooth(likely: Tensor) -> Tensor:
    """Return likelihoods of which a part goes by the order of the vocabulary; none is zero."""
    order = 1.0 / (torch.arange(len(likely), dtype=torch.float64) + ORDER_OFFSET)
    order = 0.95 * order / order.sum() + 0.05 / len(likely)
    return ((1 - VOCABULARY_SHARE) * likely + VOCABULARY_SHARE * order).float()


def find_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a chat template puts before and behind whatever a user says.

    Both are empty without a template, or with one that does not take a single message.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [], []
    said = ("0", "What else?")
    try:
        first, second = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for text in said
        )
    except Exception:  # noqa: BLE001  a template may raise whatever it likes
        return [], []
    prefix = _shared(first, second)
    rest = [ids[len(prefix) :] for ids in (first, second)]
    suffix = _shared(*(ids[::-1] for ids in rest))[::-1]
    return prefix, suffix


def _shared(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return what two lists begin with."""
    shared: list[int] = []
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared.append(one)
    return shared
