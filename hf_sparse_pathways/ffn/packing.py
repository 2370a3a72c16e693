"""Weights laid out for oneDNN's matrix product, and the test that says whether it pays here.

``linear`` hands oneDNN (or BLAS) a plain matrix, which is read row by row or brought into blocks
anew at every call; a matrix that was packed once streams from memory faster. PyTorch's operators
for it are private. They are used only after a test in this process: they have to be there, to
return what ``linear`` returns within the dtype's tolerance, and to be faster on this machine.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that oneDNN multiplies, where the processor can."""

_BLOCK = 64
"""oneDNN pads both sides of a packed matrix to multiples that divide this."""

_BATCHES = (1, 4)
"""Rows of the inputs that are timed: decoding is what packing is for."""

_STREAM_BYTES = 48 << 20
"""Weights that are timed together: more than the processor's caches hold."""

_MOST_MATRICES = 64

_ROUNDS = 5

_MANY_ROWS = 4

_LEAST_SIZE = 20
"""Matrices of less than two to this power entries are multiplied too quickly for it to matter."""

_WORTH = 1.05
"""Ratio from which on repeating a row pays."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error, relative to the largest output, that counts as equal."""


@dataclass(frozen=True)
class Packed:
    """A packed matrix.

    Attributes:
        weight: The opaque tensor.
        least_rows: Rows that an input needs for the faster of oneDNN's kernels.
    """

    weight: Tensor
    least_rows: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``linear`` of ``(..., inputs)``."""
        if self.least_rows > 1 and x.numel() == x.shape[-1]:
            rows = x.reshape(1, -1).expand(self.least_rows, -1)
            return _product(rows, self.weight, bias)[:1].view(*x.shape[:-1], -1)
        return _product(x, self.weight, bias)


def pack(weight: Tensor) -> Packed:
    """Return a matrix ``(outputs, inputs)`` packed. Pure."""
    packed = _pack(weight)
    size, threads = weight.numel().bit_length(), torch.get_num_threads()
    return Packed(packed, _least_rows(size, weight.dtype, threads))


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output


def packed_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Return how many bytes a packed matrix takes at most."""
    return _padded(rows) * _padded(columns) * itemsize


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class Verdict:
    """Whether packing may be used.

    Attributes:
        usable: Whether it is there, equal and faster.
        reason: Why, or why not; a clause for a message.
    """

    usable: bool
    reason: str


def judge(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Verdict:
    """Say whether packed matrices of a shape are worth it here; tested once in a process.

    Args:
        shape: ``(outputs, inputs)`` of the matrices.
        dtype: Theirs.
        device: Where they are.
    """
    if device.type != "cpu":
        return Verdict(False, f"packing is for the CPU, and the weights are on {device.type}")
    if dtype not in DTYPES:
        return Verdict(False, f"oneDNN does not pack {str(dtype).removeprefix('torch.')}")
    return _judge(shape, dtype, torch.get_num_threads())


def judge_all(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Verdict:
    """Say whether packed matrices of all these shapes are worth it; see ``judge``."""
    verdicts = [judge(shape, dtype, device) for shape in sorted(shapes)]
    return next((verdict for verdict in verdicts if not verdict.usable), verdicts[-1])


@functools.lru_cache(maxsize=256)
@torch.inference_mode()
def _judge(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> Verdict:
    problem = _find_problem(shape, dtype)
    if problem:
        return Verdict(False, problem)
    ratio = measure_gain(shape, dtype)
    label = f"packed weights are {ratio:.2f}x as fast as plain ones (threads: {threads})"
    return Verdict(ratio > 1.0, label)


def _find_problem(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Return why packing cannot be used, or None if its results are ``linear``'s."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    try:
        packed = Packed(_pack(weight), _MANY_ROWS)
        for rows, added in itertools.product((1, 3), (bias, None)):
            x = torch.randn(rows, shape[1], generator=generator).to(dtype)
            expected = functional.linear(x, weight, added)
            error = (packed(x, added) - expected).abs().max()
            if not error <= _TOLERANCE[dtype] * expected.abs().max():
                return "this version of torch computes something else with packed weights"
    except (AttributeError, RuntimeError) as failure:  # private operators: not in every build
        return f"packing does not work here ({str(failure).splitlines()[0][:90]})"
    return None


def measure_gain(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return how many times as fast packed products are as plain ones, by wall clock.

    Both are timed in turn on as many matrices as do not fit the caches.
    """
    plain = _matrices(shape, dtype)
    packed = [pack(weight) for weight in plain]
    inputs = [torch.ones(batch, shape[1], dtype=dtype) for batch in _BATCHES]

    def linear() -> None:
        for x, weight in itertools.product(inputs, plain):
            functional.linear(x, weight)

    def product() -> None:
        for x, weight in itertools.product(inputs, packed):
            weight(x)

    return _ratio(linear, product)


@functools.lru_cache(maxsize=256)
@torch.inference_mode()
def _least_rows(size: int, dtype: torch.dtype, threads: int) -> int:  # noqa: ARG001
    """Return how many rows a vector is best repeated to, for matrices of ``2 ** size`` entries.

    oneDNN has another kernel for one row, which on some processors reads the weights more slowly.
    """
    if size < _LEAST_SIZE:
        return 1
    side = 2 ** (size // 2)
    weights = [_pack(weight) for weight in _matrices((2**size // side, side), dtype)]
    x = torch.ones(1, side, dtype=dtype)

    def run(rows: int) -> None:
        for weight in weights:
            Packed(weight, rows)(x)

    return _MANY_ROWS if _ratio(lambda: run(1), lambda: run(_MANY_ROWS)) > _WORTH else 1


def _matrices(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return as many equal matrices as do not fit the caches, within reason."""
    size = shape[0] * shape[1] * dtype.itemsize
    count = min(_MOST_MATRICES, -(-_STREAM_BYTES // size))
    return [torch.ones(shape, dtype=dtype) for _ in range(count)]


def _ratio(slow: Callable[[], None], fast: Callable[[], None]) -> float:
    """Return the median of how many times as long the first takes, timed in turn."""

    def seconds(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return statistics.median(seconds(slow) / seconds(fast) for _ in range(_ROUNDS))
