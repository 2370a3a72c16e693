"""Healing that begins with the dense model: who takes which steps, what is cut, who teaches."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.healing.losses import Objective
from hf_sparse_pathways.pathways.names import TUNED
from tests.architectures import build, prompt, random_masks
from tests.healing.healings import heal, same, sparse, watch_batches

IDS = prompt(2, 9)

_TRAINED = {
    "lora": {},
    "attention": {"attention": True, "keep": "lora"},
    "weights": {"train": "weights"},
}


@pytest.mark.parametrize("train", ["lora", "weights"])
def test_the_dense_model_takes_the_first_steps_and_the_pathway_the_others(train, monkeypatch):
    seen = watch_batches(monkeypatch)
    model = sparse()
    settings = {"train": train, "dense_first": 0.5, "patience": 99}
    result = heal(model, dense_partner=True, **settings)
    partner, student = seen.values()
    assert len(partner["batches"]) == 6
    assert student["batches"] == partner["batches"][3:]
    report = result.reports["code"]
    assert [point.step for point in report.dense_curve] == [0, 2, 4, 6]
    assert [point.step for point in report.curve] == [3, 4, 6]
    assert report.tokens == report.dense_curve[-1].tokens
    assert report.curve[0].validation < report.before, "what all neurons learnt is kept"
    assert report.before == pytest.approx(heal(model, steps=1).reports["code"].before, abs=1e-4)
    seen.clear()
    alone = heal(model, **settings)
    dense, again = seen.values()
    assert dense["batches"] == partner["batches"][:3], "no further than it is needed"
    assert again["batches"] == student["batches"]
    assert same(alone.pathways, result.pathways)
    assert f"{TUNED}code" not in alone.pathways.controls


def _whole():
    """Return a model whose pathway keeps every neuron."""
    dense = build("llama")
    masks = {n: [torch.ones_like(m) for m in own] for n, own in random_masks(dense).items()}
    return sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))


@pytest.mark.parametrize("how", _TRAINED)
@pytest.mark.parametrize("patience", [2, 99])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_pathway_that_keeps_everything_is_the_partner(how, patience, share):
    """Whatever it does better would be an advantage in the comparison."""
    settings = {"steps": 40, "validations": 20, "patience": patience, "dense_first": share}
    settings |= {"learning_rate": 1e-3 if how == "weights" else 5e-3, **_TRAINED[how]}
    report = heal(_whole(), dense_partner=True, **settings).reports["code"]
    assert report.honest_ratio > 0.999
    if not share:
        assert report.honest_ratio < 1.001
    cut = next(point for point in report.dense_curve if point.step == round(40 * share))
    assert report.curve[0].validation == pytest.approx(cut.validation, abs=1e-4)


def _see_teacher(monkeypatch):
    """Record at every batch the logits of the student and of its teacher."""
    found = []
    call = Objective.__call__

    def watch(self, model, batch):
        if self.teacher is not None:
            found.append([m(IDS).logits.detach().float() for m in (model, self.teacher)])
        return call(self, model, batch)

    monkeypatch.setattr(Objective, "__call__", watch)
    return found


@pytest.mark.parametrize("how", _TRAINED)
def test_the_teacher_can_be_the_dense_model_at_the_cut(how, monkeypatch):
    found = _see_teacher(monkeypatch)
    settings = {"dense_first": 0.5, "loss": "lm+kl", "precision": "model", **_TRAINED[how]}
    whole = _whole()
    heal(whole, teacher="cut", **settings)
    own, taught = found[0]
    assert torch.allclose(own, taught, atol=1e-4), "where nothing is cut out, they are the same"
    assert not torch.allclose(taught, whole(IDS).logits, atol=1e-3), "it has learnt"
    assert torch.equal(found[-1][1], taught), "it learns no more"
    assert not torch.allclose(found[-1][0], own, atol=1e-3), "the student does"
    found.clear()
    heal(whole, teacher="tuned", dense_partner=True, **settings)
    assert not torch.allclose(found[0][1], taught, atol=1e-3), "the partner has gone on"


@pytest.mark.parametrize("precision", ["model", "bfloat16"])
@pytest.mark.parametrize("how", _TRAINED)
def test_the_teacher_at_the_cut_has_all_neurons(how, precision, monkeypatch):
    found = _see_teacher(monkeypatch)
    settings = {"dense_first": 0.5, "loss": "kl", "precision": precision, **_TRAINED[how]}
    heal(_whole(), teacher="cut", **settings)
    heal(sparse(), teacher="cut", **settings)
    (_, dense), (pruned, taught) = found[0], found[len(found) // 2]
    assert torch.allclose(taught, dense, atol=1e-4), "whatever the pathway keeps"
    assert not torch.allclose(pruned, dense, atol=1e-2)


def test_what_is_cut_is_not_stopped_before():
    settings = {"steps": 40, "validations": 20, "patience": 1, "learning_rate": 30.0}  # diverges
    last = [
        heal(_whole(), dense_first=first, dense_partner=True, **settings)
        .reports["code"]
        .dense_curve[-1]
        .step
        for first in (0.0, 0.5)
    ]
    assert last[0] < 20
    assert last[1] >= 22, "a validation is given to what goes on from the cut"


def test_a_cut_lora_keeps_its_rank():
    result = heal(sparse(compensated=False), dense_first=0.5, dense_partner=True)
    for name in ("code", f"{TUNED}code"):
        for block in result.pathways[name].blocks:
            assert {change.rank for change in (*block.incoming, block.delta)} == {4}
