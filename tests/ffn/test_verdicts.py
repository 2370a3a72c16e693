"""Another form of weights is used only where it is there, equal and faster."""

import pytest
import torch

from hf_sparse_pathways.ffn import packing, timing, verdicts
from hf_sparse_pathways.ffn.forms import NATIVE, PACKED, Rows
from hf_sparse_pathways.ffn.stored import Stored
from hf_sparse_pathways.native import product
from hf_sparse_pathways.native.library import NativeError

CPU = torch.device("cpu")
BREAKABLE = {PACKED: (packing, "_product"), NATIVE: (product, "_by_kernel")}
FORMS = [
    pytest.param(PACKED, marks=pytest.mark.needs_packing, id="packed"),
    pytest.param(NATIVE, marks=pytest.mark.needs_compiler, id="native"),
]


@pytest.fixture(autouse=True)
def _judge_anew():
    verdicts._judge.cache_clear()
    yield
    verdicts._judge.cache_clear()


def _gain(monkeypatch, ratio):
    monkeypatch.setattr(verdicts, "measure_gain", lambda *_: ratio)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_slower_or_wrong_is_not_usable(form, monkeypatch):
    for gain, usable in ((0.89, False), (0.95, form is NATIVE), (1.05, True)):
        _gain(monkeypatch, gain)
        verdicts._judge.cache_clear()
        verdict = verdicts.judge(form, (8, 8), torch.float32, CPU)
        assert (verdict.usable, verdict.gain) == (usable, gain)
        assert f"{gain:.2f}x" in verdict.reason
    _gain(monkeypatch, 1.5)
    verdicts._judge.cache_clear()
    verdict = verdicts.judge(form, (8, 8), torch.float32, CPU)
    assert (verdict.usable, verdict.gain) == (True, 1.5)
    verdicts._judge.cache_clear()
    monkeypatch.setattr(*BREAKABLE[form], lambda *_: torch.zeros(8))
    verdict = verdicts.judge(form, (8, 8), torch.float32, CPU)
    assert (verdict.usable, verdict.gain) == (False, 0.0)
    assert "something else" in verdict.reason


@pytest.mark.parametrize("form", FORMS)
def test_a_verdict_within_autocast_holds_after_it(form, monkeypatch):
    _gain(monkeypatch, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert verdicts.judge(form, (8, 8), torch.float32, CPU).usable


@pytest.mark.parametrize(
    ("form", "place", "error"),
    [
        (PACKED, (packing, "_pack"), AttributeError("no operator _reorder_linear_weight")),
        (PACKED, (packing, "_pack"), RuntimeError("could not create a primitive\nand more")),
        (NATIVE, (verdicts, "load_kernel"), NativeError("no C compiler was found")),
    ],
)
def test_what_is_missing_is_a_reason_not_an_error(form, place, error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(*place, fail)
    verdict = verdicts.judge(form, (8, 8), torch.float32, CPU)
    assert not verdict.usable
    assert str(error).splitlines()[0] in verdict.reason
    assert "more" not in verdict.reason


@pytest.mark.parametrize("form", [PACKED, NATIVE])
@pytest.mark.parametrize(
    ("dtype", "device", "word"),
    [(torch.float64, CPU, "float64"), (torch.float32, torch.device("meta"), "meta")],
)
def test_what_cannot_be_is_said(form, dtype, device, word):
    verdict = verdicts.judge(form, (8, 8), dtype, device)
    assert not verdict.usable
    assert word in verdict.reason


def test_of_several_shapes_the_worst_counts(monkeypatch):
    gains = {(8, 8): 2.0, (8, 16): 0.5, (16, 8): 1.5}
    monkeypatch.setattr(verdicts, "find_problem", lambda *_: None)
    monkeypatch.setattr(verdicts, "measure_gain", lambda _, shape, __: gains[shape])
    assert verdicts.judge_all(PACKED, gains, torch.float32, CPU).gain == 0.5
    del gains[8, 16]
    assert verdicts.judge_all(PACKED, gains, torch.float32, CPU).gain == 1.5


@pytest.mark.parametrize("form", [PACKED, NATIVE])
def test_gain_is_a_ratio_of_two_timings(form, monkeypatch):
    clock = [0.0]

    def spend(seconds, output):
        clock[0] += seconds
        return output

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(packing, "_pack", lambda weight: weight)
    monkeypatch.setattr(packing, "_product", lambda x, *_: spend(1.0, x))
    monkeypatch.setattr(Rows, "__call__", lambda _, x: spend(1.0, x))
    monkeypatch.setattr(verdicts.functional, "linear", lambda x, *_: spend(3.0, x))
    assert verdicts.measure_gain(form, (8, 8), torch.float32) == 3.0


@pytest.mark.needs_compiler
def test_rows_are_judged_with_gaps_between_them():
    *_, made = verdicts._make(NATIVE, Stored(torch.tensor([[1.0], [2.0]])), 3)
    assert made.weight.flatten().tolist() == [1, 1, 2, 2]
    assert made.rows.tolist() == [0, 2]


@pytest.mark.needs_compiler
def test_matrices_that_are_timed_are_parts_of_one_tensor():
    for found in (
        timing.matrices((4, 8), torch.float32),
        [one.weight for one in verdicts._make(NATIVE, Stored(torch.ones(4, 8)), 5)],
    ):
        assert len(found) > 1
        assert len({one.untyped_storage().data_ptr() for one in found}) == 1
