"""The kernel in C: every shape, dtype and thread count, and machines that cannot compile it."""

import functools
import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from hf_sparse_pathways.native import library, product
from hf_sparse_pathways.native.product import linear_rows, sum_rows

DTYPES = (torch.float32, torch.bfloat16)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 130)


@pytest.fixture(autouse=True)
def _load_anew():
    library.find_kernel.cache_clear()
    yield
    library.find_kernel.cache_clear()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """What compiles as the library does, but each command once."""
    compile_it = library._compile

    @functools.cache
    def compiled(compiler, flags):
        return compile_it(compiler, flags, tmp_path_factory.mktemp("kernel"))

    return lambda compiler, flags, folder: Path(
        shutil.copy(compiled(tuple(compiler), tuple(flags)), folder)
    )


@pytest.fixture
def own_cache(monkeypatch, tmp_path, compile_once):
    monkeypatch.setattr(library, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "_compile", compile_once)
    return tmp_path / "home" / "hf_sparse_pathways"


def _case(n, k, m, dtype, weight_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    height = n + 11
    if weight_dtype == torch.int8:
        weight = torch.randint(-127, 128, (height, k), generator=generator, dtype=torch.int8)
    else:
        weight = normal(height, k).to(weight_dtype)
    rows = torch.randperm(height, generator=generator)[:n].sort().values
    return normal(m, k).to(dtype), weight, rows, normal(n).abs() + 0.1, normal(n).to(dtype)


def _expected(x, weight, rows, scale, bias):
    """The same in float64."""
    chosen = (weight if rows is None else weight[rows]).double()
    if scale is not None:
        chosen = chosen * scale[:, None].double()
    return functional.linear(x.double(), chosen, None if bias is None else bias.double())


def _close(found, expected):
    limit = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[found.dtype]
    return (found.double() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.needs_compiler
@pytest.mark.parametrize("many", [False, True], ids=["kernel", "tiles"])
@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_linear(dtype, weights, many, monkeypatch):
    monkeypatch.setattr(product, "MOST_INPUTS", 0 if many else 100)
    monkeypatch.setattr(product, "_TILE_BYTES", 128)
    kind = torch.int8 if weights == "int8" else dtype
    for n, k in itertools.product(SIZES, SIZES):
        x, weight, rows, scale, bias = _case(n, k, 1 + (n * k) % 11, dtype, kind)
        if weights == "own":
            scale = None
        for added in (None, bias):
            found = linear_rows(x, weight, rows, scale, added)
            assert found.dtype == dtype
            limit = 3 if many and dtype == torch.bfloat16 else 1  # bias and scale round, too
            expected = _expected(x, weight, rows, scale, added)
            error = (found.double() - expected).abs().max()
            assert error <= limit * expected.abs().max() * (2e-6 if dtype.itemsize == 4 else 8e-3)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("many", [False, True], ids=["kernel", "gathered"])
@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_rows_are_products_with_the_transposed(dtype, weights, many, monkeypatch):
    monkeypatch.setattr(product, "MOST_INPUTS", 0 if many else 100)
    kind = torch.int8 if weights == "int8" else dtype
    for n, d_out in itertools.product(SIZES, (*SIZES, 64, 256, 300)):
        _, weight, rows, _, _ = _case(n, d_out, 1, dtype, kind)
        x, _, _, scale, bias = _case(d_out, n, 1 + (n * d_out) % 11, dtype, kind)
        scale = scale if weights == "int8" else None
        for index, added in ((rows, bias), (rows, None), (None, bias)):
            own = x if index is not None else x[:, :1].expand(-1, len(weight)).contiguous()
            found = sum_rows(own, weight, index, scale, added)
            assert found.dtype == dtype
            chosen = weight if index is None else weight[index]
            expected = _expected(own, chosen.T, None, scale, added)
            limit = 3 if many and dtype == torch.bfloat16 else 1
            error = (found.double() - expected).abs().max()
            assert error <= limit * expected.abs().max() * (4e-6 if dtype.itemsize == 4 else 8e-3)


@pytest.mark.needs_compiler
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ()], ids=["avx2", "none"])
@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_processors_with_shorter_vectors(dtype, weights, flags, monkeypatch):
    if flags and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(library, "_TRIED", (flags,))
    kind = torch.int8 if weights == "int8" else dtype
    for n, k in itertools.product((1, 4, 9, 33), (1, 7, 8, 16, 130)):
        x, weight, rows, scale, bias = _case(n, k, 1 + (n * k) % 11, dtype, kind)
        scale = scale if weights == "int8" else None
        found = linear_rows(x, weight, rows, scale, bias)
        assert _close(found, _expected(x, weight, rows, scale, bias))
        y = torch.randn(len(x), n).to(dtype)
        assert _close(sum_rows(y, weight, rows), _expected(y, weight[rows].T, None, None, None))
    assert not isinstance(library.find_kernel(), library.NativeError)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_share_the_columns(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for d_out in (3, 40, 300):
            _, weight, rows, _, _ = _case(9, d_out, 1, torch.float32, torch.float32)
            x = torch.randn(3, 9)
            found = sum_rows(x, weight, rows)
            assert _close(found, _expected(x, weight[rows].T, None, None, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 1, 5)])
@pytest.mark.parametrize("rows", ["some", "all", "none"])
def test_leading_dimensions_and_empty_products(leading, rows):
    x, weight, chosen, _, _ = _case(6, 8, 1, torch.float32, torch.float32)
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
    x, weight, rows, _, _ = _case(9, 20, 2, torch.bfloat16, torch.bfloat16)
    view = weight[:, 3:15]
    assert _close(linear_rows(x[:, :12], view, rows), _expected(x[:, :12], view, rows, None, None))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_threads_share_the_rows(threads, n):
    x, weight, rows, _, bias = _case(n, 40, 3, torch.float32, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = linear_rows(x, weight, rows, None, bias)
    finally:
        torch.set_num_threads(before)
    assert _close(found, _expected(x, weight, rows, None, bias))


@pytest.mark.needs_compiler
def test_callers_on_several_threads_do_not_disturb_each_other():
    cases = [_case(50, 70, 2, torch.bfloat16, torch.bfloat16, seed) for seed in range(8)]
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
        x, weight, rows, _, _ = _case(9, 70, many, torch.float32, torch.float32)
        assert _close(linear_rows(x, weight), _expected(x, weight, None, None, None))
        assert _close(linear_rows(x, weight, rows), _expected(x, weight, rows, None, None))
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
    x, weight, rows, scale, bias = _case(6, 8, 2, torch.float32, torch.float32)
    apart = torch.randn(6, 3)[:, 1]
    for own in (apart, bias[:1], bias[:1].expand(6), bias.double(), bias.bfloat16()):
        for factors in (None, scale, (apart.abs() + 1), scale[:1].expand(6)):
            found = linear_rows(x, weight, rows, factors, own)
            assert _close(found, _expected(x, weight, rows, factors, own.float()))
    every_other = torch.stack([rows, rows], 1)[:, 0]
    for index in (every_other, rows.int()):
        assert _close(linear_rows(x, weight, index), _expected(x, weight, rows, None, None))
    with pytest.raises(RuntimeError):
        linear_rows(x, weight, rows, None, bias[:5])


@pytest.mark.needs_compiler
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_trace_holds_the_operator():
    x, weight, rows, _, bias = _case(5, 8, 2, torch.float32, torch.float32)
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
    x, weight, rows, _, bias = _case(5, 8, 2, torch.float32, torch.float32)

    def twice(x):
        return linear_rows(x, weight, rows, None, bias) * 2

    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), twice(x))
    torch.library.opcheck(product._traced, (x, weight, rows, None, bias))


@pytest.mark.needs_compiler
def test_it_is_compiled_once_and_kept(own_cache, monkeypatch):
    library.load_kernel()
    kept = sorted(own_cache.iterdir())
    assert [path.suffix for path in kept] == [".sha256", ".so"]
    library.find_kernel.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("it was compiled again"))
    library.load_kernel()
    assert sorted(own_cache.iterdir()) == kept


@pytest.mark.needs_compiler
@pytest.mark.parametrize("damage", ["no library", "half of it", "no sum"])
def test_a_damaged_library_is_compiled_again(damage, own_cache):
    library.load_kernel()
    (kept,) = own_cache.glob("*.so")
    content = kept.read_bytes()
    kept.unlink()  # it is mapped: written to in place it would end the process
    if damage != "no library":
        kept.write_bytes(content[: 4096 if damage == "half of it" else None])
    if damage == "no sum":
        kept.with_suffix(".sha256").unlink()
    library.find_kernel.cache_clear()
    x, weight, rows, _, _ = _case(9, 20, 2, torch.float32, torch.float32)
    assert _close(linear_rows(x, weight, rows), _expected(x, weight, rows, None, None))
    assert library._read_kept(kept) is not None


@pytest.mark.needs_compiler
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
@pytest.mark.parametrize("doubt", ["writable by the group", "writable by all", "of another user"])
def test_a_library_that_another_user_can_have_written_is_not_loaded(
    doubt, suffix, own_cache, monkeypatch
):
    before = os.umask(0)
    try:
        library.load_kernel()
    finally:
        os.umask(before)
    (kept,) = own_cache.glob("*.so")
    assert library._read_kept(kept), "nobody else may write it, whatever the mask"
    if doubt == "of another user":
        monkeypatch.setattr(library, "_user", lambda: os.geteuid() + 1)
    else:
        kept.with_suffix(suffix).chmod(0o620 if "group" in doubt else 0o602)
    assert library._read_kept(kept) is None


@pytest.mark.needs_compiler
def test_what_is_loaded_is_what_was_checked(own_cache, monkeypatch):
    library.load_kernel()
    library.find_kernel.cache_clear()
    load, loaded = library.ctypes.CDLL, []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    library.load_kernel()
    assert not [path for path in loaded if path.startswith(str(own_cache))]
    assert loaded


@pytest.mark.needs_compiler
def test_another_processor_or_source_has_a_library_of_its_own(monkeypatch, tmp_path):
    names = {library._digest(["cc"]), library._digest(["cc", "-O3"])}
    monkeypatch.setattr(library.platform, "machine", lambda: "vax")
    names.add(library._digest(["cc"]))
    source = tmp_path / "linear.c"
    source.write_text("other")
    monkeypatch.setattr(library, "_SOURCE", source)
    names.add(library._digest(["cc"]))
    assert len(names) == 4


@pytest.mark.needs_compiler
def test_a_folder_that_cannot_be_written_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(library, "HF_HOME", str(tmp_path / "home"))
    library.load_kernel()
    assert (tmp_path / "home").read_text() == "a file"


@pytest.mark.usefixtures("own_cache")
def test_without_a_compiler_the_reason_says_so(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda _: None)
    with pytest.raises(library.NativeError, match="no C compiler"):
        library.load_kernel()


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "echo", 'gcc "'])
def test_a_compiler_that_fails_is_named(command, monkeypatch, own_cache):
    monkeypatch.setenv("CC", command)
    with pytest.raises(library.NativeError, match=command):
        library.load_kernel()
    assert not own_cache.exists() or not list(own_cache.iterdir())


@pytest.mark.needs_compiler
@pytest.mark.usefixtures("own_cache")
def test_flags_that_a_compiler_does_not_have_are_left_out(monkeypatch):
    compile_it, tried = library._compile, []

    def refuse(compiler, flags, folder):
        tried.append(set(flags))
        if "-fopenmp" in flags:
            raise subprocess.CalledProcessError(1, compiler, stderr=b"no -fopenmp here\n")
        return compile_it(compiler, flags, folder)

    monkeypatch.setattr(library, "_compile", refuse)
    library.load_kernel()
    assert ["-fopenmp" in flags for flags in tried] == [True, False]
    x, weight, rows, _, _ = _case(9, 20, 2, torch.float32, torch.float32)
    assert _close(linear_rows(x, weight, rows), _expected(x, weight, rows, None, None))


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
        x, weight, rows, scale, bias = _case(9, 20, 2, torch.float32, kind)
        found = linear_rows(x, weight, rows, scale, bias)
        assert _close(found, _expected(x, weight, rows, scale, bias))
    assert len(tried) == len(library._TRIED), "it was tried again"


def test_a_kernel_without_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(product, "find_kernel", lambda: SimpleNamespace(linear=lambda *_: 1))
    with pytest.raises(MemoryError, match="smaller batch"):
        linear_rows(torch.ones(1, 2), torch.ones(2, 2))


def test_the_first_line_of_a_compilers_complaint_is_told():
    error = subprocess.CalledProcessError(1, "cc", stderr=b"linear.c:1: bad\nmore\n")
    assert library._describe(error) == "linear.c:1: bad"
    assert "cc" in library._describe(subprocess.CalledProcessError(1, "cc"))
