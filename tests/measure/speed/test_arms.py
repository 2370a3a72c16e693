"""Who takes part, under which name, and beside which partner."""

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn import executors as ffn_executors
from hf_sparse_pathways.ffn import verdicts
from hf_sparse_pathways.ffn.executors import EXECUTORS, Compact, has_own_dense
from hf_sparse_pathways.ffn.forms import PACKED
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.measure.speed.arms import DENSE, line_up
from tests.architectures import build, compensate, random_masks, tiny_llama

pytestmark = pytest.mark.usefixtures("every_form_pays")

USUAL = {"masked": ffn_executors.Masked(), "compact": Compact()}


@pytest.fixture
def only(monkeypatch):
    """Register some executors and no others."""

    def register(**registered):
        for name in list(EXECUTORS):
            monkeypatch.delitem(EXECUTORS, name)
        for name, executor in {**USUAL, **registered}.items():
            monkeypatch.setitem(EXECUTORS, name, executor)

    return register


def _pathways(model=None):
    model = model or tiny_llama()
    return sp.Pathways.from_masks(model, random_masks(model))


def test_every_registered_executor_takes_part_by_itself(only):
    only(twin=Compact())
    lineup = line_up(tiny_llama(), _pathways(), ["law"])
    assert list(lineup.models) == ["masked", "compact", "twin"]
    assert [arm.label for arm in lineup.arms] == [
        "dense",
        "plug-in, no domain",
        "masked, law",
        "compact, law",
        "twin, law",
    ]
    assert not lineup.unavailable


def test_kernels_of_their_own_have_a_dense_partner_of_their_own(only):
    only(packed=Compact(PACKED))
    names = ("auto", "masked", "compact", "packed")
    assert [has_own_dense(name) for name in names] == [False, False, False, True]
    lineup = line_up(tiny_llama(), _pathways(), ["law"])
    partners = {arm.label: arm.partner for arm in lineup.arms}
    assert partners["packed, law"] == partners["packed, dense"] == "packed, dense"
    assert partners["compact, law"] == partners["masked, law"] == DENSE
    assert partners["dense"] == partners["plug-in, no domain"] == DENSE
    assert [arm.label for arm in lineup.dense_partners] == ["dense", "packed, dense"]


def test_an_executor_in_whose_place_another_runs_is_not_timed(only, monkeypatch):
    only(packed=Compact(PACKED))
    monkeypatch.setattr(verdicts, "find_problem", lambda *_: "this build of torch has no oneDNN")
    verdicts._judge.cache_clear()
    lineup = line_up(tiny_llama(), _pathways(), ["law"])
    assert lineup.unavailable == {
        "packed": "compact runs in its place: this build of torch has no oneDNN"
    }
    assert list(lineup.models) == ["masked", "compact"]
    assert not any("packed" in arm.label for arm in lineup.arms)
    verdicts._judge.cache_clear()


def test_an_executor_without_room_for_copies_is_not_timed(only, monkeypatch):
    only()
    monkeypatch.setattr(Residents, "pin", lambda *_: False)
    lineup = line_up(tiny_llama(), _pathways(), ["law"])
    assert list(lineup.models) == ["masked"]
    assert lineup.unavailable == {"compact": "masked runs in its place: no room for copies of code"}


def test_an_executor_that_needs_no_copies_is_timed(only, monkeypatch):
    only()
    monkeypatch.setattr(sp.SparsePathwaysForCausalLM, "prepare", lambda *_: False)
    lineup = line_up(tiny_llama(), _pathways(), ["law"])
    assert list(lineup.models) == ["masked", "compact"]
    assert not lineup.copies


def test_chosen_executors_alone_take_part_and_auto_is_one_of_them(only):
    only()
    assert list(line_up(tiny_llama(), _pathways(), ["law"], ["masked"]).models) == ["masked"]
    lineup = line_up(tiny_llama(), _pathways(), ["law"], ["auto", "compact"])
    assert list(lineup.models) == [lineup.auto.executor] == ["compact"]
    assert lineup.auto.reason
    with pytest.raises(UnknownNameError, match="Did you mean 'compact'"):
        line_up(tiny_llama(), _pathways(), ["law"], ["compct"])


def test_copies_of_all_pathways_stay_and_weights_are_shared(only):
    only()
    dense = build("llama")
    masks = {
        name: random_masks(dense, ["x"], keep=0.9, seed=i)["x"] for i, name in enumerate("abcd")
    }
    lineup = line_up(dense, sp.Pathways.from_masks(dense, masks), ["a", "b"])
    compact = lineup.models["compact"]
    assert list(compact.resident) == ["a", "b", "c", "d"], "more than the weights' own bytes"
    assert {(c.executor, c.pathway): c.bytes for c in lineup.copies} == {
        ("compact", name): size for name, size in compact.resident.items()
    }
    own = [p.data_ptr() for p in dense.parameters()]
    for model in lineup.models.values():
        assert [p.data_ptr() for p in model.parameters()] == own
        assert not model.training


def test_what_is_removed_counts_the_bypass():
    dense = build("llama")
    pathways = compensate(dense, random_masks(dense))
    lineup = line_up(dense, pathways, ["code"], ["compact"])
    arm = lineup.arms[-1]
    assert arm.sparsity == pathways.sparsity("code")
    assert arm.removed == 1.0 - pathways.flops("code") < arm.sparsity
