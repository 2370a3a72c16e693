"""The test that says whether a form of weights may be used here.

It has to be there (private operators of torch, a C compiler), to return what ``linear`` returns
within the dtype's tolerance, and to be faster on this machine, or nearly as fast in less memory.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.ffn.forms import NATIVE, Form, Product, Rows, Sums
from hf_sparse_pathways.ffn.stored import Stored, quantise
from hf_sparse_pathways.ffn.timing import matrices, time_ratio
from hf_sparse_pathways.native.library import load_kernel

_BATCHES = (1, 4)
"""Rows of the inputs that are timed: decoding is what other forms are for."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error, relative to the largest output, that counts as equal."""


@dataclass(frozen=True)
class Verdict:
    """Whether a form may be used.

    Attributes:
        usable: Whether it is there, equal and fast enough.
        reason: Why, or why not; a clause for a message.
        gain: How many times as fast as plain weights it was measured to be; 0 if it was not.
    """

    usable: bool
    reason: str
    gain: float = 0.0


def judge(form: Form, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Verdict:
    """Say whether matrices of a shape are worth having in a form; tested once in a process.

    Args:
        form: Not ``PLAIN``.
        shape: ``(outputs, inputs)`` of the matrices.
        dtype: Theirs.
        device: Where they are.
    """
    if device.type != "cpu":
        return Verdict(False, f"{form.label} are for the CPU, and the model is on {device.type}")
    if dtype not in form.dtypes:
        return Verdict(False, f"there are no {form.label} of {str(dtype).removeprefix('torch.')}")
    with torch.autocast("cpu", enabled=False):  # the verdict outlives the pass that asked for it
        return _judge(form, shape, dtype, torch.get_num_threads())


def judge_all(
    form: Form, shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Verdict:
    """Say whether matrices of all these shapes are worth having in a form; see ``judge``."""
    verdicts = [judge(form, shape, dtype, device) for shape in shapes]
    return min(verdicts, key=lambda verdict: (verdict.usable, verdict.gain))


@functools.lru_cache(maxsize=256)
@torch.inference_mode()
def _judge(form: Form, shape: tuple[int, int], dtype: torch.dtype, threads: int) -> Verdict:
    problem = find_problem(form, shape, dtype)
    if problem:
        return Verdict(False, problem)
    ratio = measure_gain(form, shape, dtype)
    reason = f"{form.label} are {ratio:.2f}x as fast as plain ones (threads: {threads})"
    return Verdict(ratio > form.worth, reason, ratio)


def find_problem(form: Form, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Return why a form cannot be used, or None if its results are ``linear``'s."""
    generator = torch.Generator().manual_seed(0)
    inputs = _input_dtype(dtype)
    weight = torch.randn(shape, generator=generator).to(inputs)
    bias = torch.randn(shape[0], generator=generator).to(inputs)
    stored = _store(weight, dtype)
    if stored.scale is not None:
        weight = (stored.values.float() * stored.scale[:, None]).to(inputs)
    try:
        products = _make(form, stored, 1) + ([Sums.of(stored)] if form is NATIVE else [])
        for product, rows, added in itertools.product(products, (1, 3), (bias, None)):
            x = torch.randn(rows, shape[1], generator=generator).to(inputs)
            expected = functional.linear(x, weight, added)
            error = (product(x, added) - expected).abs().max()
            if not error <= _TOLERANCE[inputs] * expected.abs().max():
                return f"{form.label} compute something else here than plain ones"
    except (AttributeError, RuntimeError) as failure:  # private operators, or no compiler
        return f"{form.label} do not work here: {str(failure).splitlines()[0][:160]}"
    return None


def measure_gain(form: Form, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return how many times as fast a form is as plain weights, by wall clock.

    Both are timed in turn on as many matrices as do not fit the caches.
    """
    plain = matrices(shape, _input_dtype(dtype))
    made = _make(form, _store(plain[0], dtype), len(plain))
    inputs = [torch.ones(batch, shape[1], dtype=plain[0].dtype) for batch in _BATCHES]

    def linear() -> None:
        for x, weight in itertools.product(inputs, plain):
            functional.linear(x, weight)

    def product() -> None:
        for x, weight in itertools.product(inputs, made):
            weight(x)

    return time_ratio(linear, product)


def _input_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what is multiplied by values of a dtype."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


def _store(weight: Tensor, dtype: torch.dtype) -> Stored:
    return quantise(weight) if dtype == torch.int8 else Stored(weight)


def _make(form: Form, stored: Stored, count: int) -> list[Product]:
    """Return some copies of a matrix in a form.

    Rows that are read in place lie apart, as kept ones do.
    """
    if form is not NATIVE:
        return [form.make(stored) for _ in range(count)]
    load_kernel()  # without it rows would be gathered
    scale = None if stored.scale is None else stored.scale.repeat_interleave(2)
    apart = stored.values.repeat_interleave(2, dim=0).repeat(count, 1, 1)
    rows = torch.arange(0, apart.shape[1], 2)
    return [Rows.of(Stored(values, scale), rows) for values in apart]
