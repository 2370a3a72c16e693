"""Products by the kernel: every shape, dtype, processor and thread count, and without it."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from hf_sparse_pathways.native import library, product
from hf_sparse_pathways.native.product import linear_rows, sum_rows
from tests.native.cases import DTYPES, in_float64, is_close, is_rounded_once, make_case

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 130)
TORCH = "torch"
AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
FLAGS = {"avx2": ("-mavx2", "-mfma"), "plain": ()}
"""Processors -> what the kernel is compiled with for them."""


@pytest.fixture(
    params=[
        "this processor",
        pytest.param("avx2", marks=pytest.mark.skipif(not AVX2, reason="it would not run here")),
        "plain",
        TORCH,
    ]
)
def way(request, own_cache, monkeypatch):  # noqa: ARG001
    """Who multiplies: the kernel as it is compiled for some processor, or torch."""
    if request.param == TORCH:
        monkeypatch.setattr(product, "MOST_INPUTS", 0)
        return TORCH
    monkeypatch.setattr(product, "MOST_INPUTS", 100)
    if request.param in FLAGS:
        monkeypatch.setattr(library, "_TRIED", (FLAGS[request.param],))
    library.load_kernel()
    return request.param


@pytest.mark.needs_compiler
@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_linear(dtype, weights, way, monkeypatch):
    monkeypatch.setattr(product, "_TILE_BYTES", 128)
    kind = torch.int8 if weights == "int8" else dtype
    for n, k in itertools.product(SIZES, SIZES):
        x, weight, rows, scale, bias = make_case(n, k, 1 + (n * k) % 11, dtype, kind)
        if weights == "own":
            scale = None
        for added in (None, bias):
            found = linear_rows(x, weight, rows, scale, added)
            assert found.dtype == dtype
            # with torch bias and scale round, too
            limit = 3 if way == TORCH and dtype == torch.bfloat16 else 1
            expected = in_float64(x, weight, rows, scale, added)
            error = (found.double() - expected).abs().max()
            assert error <= limit * expected.abs().max() * (2e-6 if dtype.itemsize == 4 else 8e-3)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_rows_are_products_with_the_transposed(dtype, weights, way):
    kind = torch.int8 if weights == "int8" else dtype
    for n, d_out in itertools.product(SIZES, (*SIZES, 64, 256, 300)):
        _, weight, rows, _, _ = make_case(n, d_out, 1, dtype, kind)
        x, _, _, scale, bias = make_case(d_out, n, 1 + (n * d_out) % 11, dtype, kind)
        scale = scale if weights == "int8" else None
        for index, added in ((rows, bias), (rows, None), (None, bias)):
            own = x if index is not None else x[:, :1].expand(-1, len(weight)).contiguous()
            found = sum_rows(own, weight, index, scale, added)
            assert found.dtype == dtype
            chosen = weight if index is None else weight[index]
            expected = in_float64(own, chosen.T, None, scale, added)
            limit = 3 if way == TORCH and dtype == torch.bfloat16 else 1
            error = (found.double() - expected).abs().max()
            assert error <= limit * expected.abs().max() * (4e-6 if dtype.itemsize == 4 else 8e-3)


@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_inputs_of_an_emulated_format_are_multiplied_in_float32(dtype, weights, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    multiplied = set()

    def linear(x, *given):
        multiplied.add(x.dtype)
        return functional.linear(x, *given)

    monkeypatch.setattr(product, "functional", SimpleNamespace(linear=linear))
    kind = torch.int8 if weights == "int8" else dtype
    x, weight, rows, scale, bias = make_case(40, 24, 80, dtype, kind)
    if weights == "own":
        scale = None
    for tile, added in itertools.product((128, 1 << 20), (None, bias)):
        monkeypatch.setattr(product, "_TILE_BYTES", tile)
        found = linear_rows(x, weight, rows, scale, added)
        assert is_rounded_once(found, in_float64(x, weight, rows, scale, added))
    if scale is None:
        assert is_rounded_once(linear_rows(x, weight), in_float64(x, weight, None, None, None))
    x, _, _, scale, bias = make_case(24, 40, 80, dtype, kind)
    if weights == "own":
        scale = None
    found = sum_rows(x, weight, rows, scale, bias)
    assert is_rounded_once(found, in_float64(x, weight[rows].T, None, scale, bias))
    assert multiplied == {torch.float32}


def test_autocast_decides_where_a_format_is_emulated(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    x, weight, rows, _, _ = make_case(40, 24, 80, torch.bfloat16, torch.bfloat16)
    other = make_case(24, 40, 80, torch.bfloat16, torch.bfloat16)[0]
    with torch.autocast("cpu", torch.float16):
        assert linear_rows(x, weight).dtype == torch.float16
        assert linear_rows(x, weight, rows).dtype == torch.float16
        assert sum_rows(other, weight, rows).dtype == torch.float16


@pytest.mark.needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_share_the_columns(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for d_out in (3, 40, 300):
            _, weight, rows, _, _ = make_case(9, d_out, 1, torch.float32, torch.float32)
            x = torch.randn(3, 9)
            found = sum_rows(x, weight, rows)
            assert is_close(found, in_float64(x, weight[rows].T, None, None, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 1, 5)])
@pytest.mark.parametrize("rows", ["some", "all", "none"])
def test_leading_dimensions_and_empty_products(leading, rows):
    x, weight, chosen, _, _ = make_case(6, 8, 1, torch.float32, torch.float32)
    index = {"some": chosen, "all": None, "none": chosen[:0]}[rows]
    x = x[0].expand(*leading, 8)
    found = linear_rows(x, weight, index)
    own = weight if index is None else weight[index]
    assert found.shape == (*leading, len(own))
    assert torch.allclose(found, functional.linear(x, own), atol=1e-5)


@pytest.mark.needs_compiler
def test_without_inputs_the_bias_is_left():
    bias = torch.tensor([1.0, -2.0])
    found = linear_rows(torch.ones(3, 0), torch.ones(2, 0), bias=bias)
    assert torch.equal(found, bias.expand(3, 2))


@pytest.mark.needs_compiler
def test_columns_of_a_larger_matrix_are_read_in_place():
    x, weight, rows, _, _ = make_case(9, 20, 2, torch.bfloat16, torch.bfloat16)
    view = weight[:, 3:15]
    assert is_close(
        linear_rows(x[:, :12], view, rows), in_float64(x[:, :12], view, rows, None, None)
    )


@pytest.mark.needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_threads_share_the_rows(threads, n):
    x, weight, rows, _, bias = make_case(n, 40, 3, torch.float32, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = linear_rows(x, weight, rows, None, bias)
    finally:
        torch.set_num_threads(before)
    assert is_close(found, in_float64(x, weight, rows, None, bias))


@pytest.mark.needs_compiler
def test_callers_on_several_threads_do_not_disturb_each_other():
    cases = [make_case(50, 70, 2, torch.bfloat16, torch.bfloat16, seed) for seed in range(8)]
    expected = [linear_rows(*case[:3]) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda case: linear_rows(*case[:3]), cases)
            assert all(map(torch.equal, found, expected))


@pytest.mark.needs_compiler
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *itertools.product(DTYPES, [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-37]),
        (torch.float32, 1e-40),  # in bfloat16 some processors take it for zero
    ],
)
def test_extreme_values_are_those_of_torch(dtype, value):
    x, weight = torch.tensor([[value]]).to(dtype), torch.tensor([[1.0], [2.0]]).to(dtype)
    expected = functional.linear(x.float(), weight.float()).to(dtype)
    assert torch.equal(linear_rows(x, weight).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.needs_compiler
def test_the_kernel_takes_more_inputs_where_rows_would_be_gathered(monkeypatch):
    seen = []
    by_kernel = product._by_kernel
    monkeypatch.setattr(
        product, "_by_kernel", lambda *given: seen.append(len(given[2])) or by_kernel(*given)
    )
    for many in (32, 33, 64, 65):
        x, weight, rows, _, _ = make_case(9, 70, many, torch.float32, torch.float32)
        assert is_close(linear_rows(x, weight), in_float64(x, weight, None, None, None))
        assert is_close(linear_rows(x, weight, rows), in_float64(x, weight, rows, None, None))
    assert seen == [32, 32, 33, 64]


@pytest.mark.needs_compiler
def test_rounding_is_to_the_nearest_even_number():
    x = torch.arange(1, 4001, dtype=torch.float32)[:, None] * 1.0037
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    inputs = torch.cat([x.to(torch.bfloat16), torch.full_like(x, 2.0**-7).to(torch.bfloat16)], 1)
    both = torch.cat([weight, weight], 1)
    for start in range(0, 4000, product.MOST_INPUTS):
        part = inputs[start : start + product.MOST_INPUTS]
        assert torch.equal(linear_rows(part, both), part.float().sum(1, keepdim=True).bfloat16())


@pytest.mark.needs_compiler
def test_vectors_of_any_layout_are_read_as_torch_reads_them():
    x, weight, rows, scale, bias = make_case(6, 8, 2, torch.float32, torch.float32)
    apart = torch.randn(6, 3)[:, 1]
    for own in (apart, bias[:1], bias[:1].expand(6), bias.double(), bias.bfloat16()):
        for factors in (None, scale, (apart.abs() + 1), scale[:1].expand(6)):
            found = linear_rows(x, weight, rows, factors, own)
            assert is_close(found, in_float64(x, weight, rows, factors, own.float()))
    every_other = torch.stack([rows, rows], 1)[:, 0]
    for index in (every_other, rows.int()):
        assert is_close(linear_rows(x, weight, index), in_float64(x, weight, rows, None, None))
    with pytest.raises(RuntimeError):
        linear_rows(x, weight, rows, None, bias[:5])


@pytest.mark.needs_compiler
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_trace_holds_the_operator():
    x, weight, rows, _, bias = make_case(5, 8, 2, torch.float32, torch.float32)
    traced = torch.jit.trace(lambda x: linear_rows(x, weight, rows, None, bias), (x,))
    assert torch.allclose(traced(x + 1), linear_rows(x + 1, weight, rows, None, bias))


@pytest.mark.needs_compiler
def test_what_the_kernel_must_not_read_is_left_to_torch():
    weight = torch.ones(4, 8)
    sparse = weight.to_sparse_csr()
    assert torch.equal(linear_rows(torch.ones(1, 8), sparse), torch.full((1, 4), 8.0))
    with pytest.raises(RuntimeError):
        linear_rows(torch.ones(1, 9), weight)
    half = linear_rows(torch.ones(1, 8, dtype=torch.float16), weight.half())
    assert torch.equal(half, torch.full((1, 4), 8.0, dtype=torch.float16))
    assert torch.equal(linear_rows(torch.ones(1, 4), weight.T), torch.full((1, 8), 4.0))
    assert linear_rows(torch.ones(1, 8, device="meta"), weight.to("meta")).shape == (1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_rows(torch.ones(1, 8), weight).dtype == torch.bfloat16


@pytest.mark.needs_compiler
def test_it_is_one_operator_of_a_graph():
    x, weight, rows, _, bias = make_case(5, 8, 2, torch.float32, torch.float32)

    def twice(x):
        return linear_rows(x, weight, rows, None, bias) * 2

    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), twice(x))
    torch.library.opcheck(product._traced, (x, weight, rows, None, bias))


@torch.no_grad()
@pytest.mark.usefixtures("own_cache")
def test_without_a_kernel_torch_multiplies(monkeypatch):
    monkeypatch.setenv("CC", "false")
    tried = []

    def fail(*_):
        tried.append(1)
        raise OSError("no compiler works here")

    monkeypatch.setattr(library, "_load", fail)
    for kind in (torch.float32, torch.int8):
        x, weight, rows, scale, bias = make_case(9, 20, 2, torch.float32, kind)
        found = linear_rows(x, weight, rows, scale, bias)
        assert is_close(found, in_float64(x, weight, rows, scale, bias))
    assert len(tried) == len(library._TRIED), "it was tried again"


def test_a_kernel_without_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(product, "find_kernel", lambda: SimpleNamespace(linear=lambda *_: 1))
    with pytest.raises(MemoryError, match="smaller batch"):
        linear_rows(torch.ones(1, 2), torch.ones(2, 2))
