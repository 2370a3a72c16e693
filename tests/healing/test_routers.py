"""Routers of groups are trained: losses against loops, a run that goes on, what is stored."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.healing.routed_student import RoutedStudent
from hf_sparse_pathways.healing.students import frozen_copy
from hf_sparse_pathways.healing.utilisation import Utilisation
from tests.architectures import build, compensate, prompt, random_masks
from tests.grouped import GROUPS, TOP_K, grouped
from tests.texts import documents, tiny_tokenizer

QUICK = {
    "tokens": 600,
    "batch_size": 2,
    "accumulate": 1,
    "max_length": 32,
    "learning_rate": 1e-2,
    "refit_rate": 1e-3,
    "validations": 2,
    "validation_tokens": 200,
}
TEXTS = {"code": documents("code", count=20)}


def _model(name="llama"):
    dense = build(name)
    pathways = grouped(compensate(dense, random_masks(dense)))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways).eval()


def _train(model, texts=TEXTS, work_folder=None, **settings):
    chosen = sp.RouterSettings(**{**QUICK, **settings})
    return sp.train_routers(
        model, tiny_tokenizer(), texts, settings=chosen, work_folder=work_folder
    )


def _batch():
    ids = prompt(2, 9).tolist()
    return next(make_batches([Window(tuple(ids[0])), Window(tuple(ids[1][:5]))], 2))


def _student(model, **settings):
    frozen = frozen_copy(model.to_dense(), torch.device("cpu"))
    chosen = sp.RouterSettings(**{**QUICK, **settings})
    return RoutedStudent(frozen, model.pathways, "code", chosen)


def _routed_inputs(model, batch):
    """Return each block's input at the tokens of a batch."""
    seen = []
    handles = [
        block.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in find_blocks(model)
    ]
    logits = model(batch.ids, attention_mask=batch.mask.long(), domain="code").logits
    for handle in handles:
        handle.remove()
    return [x[batch.mask] for x in seen], logits


@torch.no_grad()
def test_losses_equal_loops():
    model, batch = _model(), _batch()
    told = _student(model).eval()(batch.ids, batch.mask)
    inputs, logits = _routed_inputs(model, batch)
    dense = model(batch.ids, attention_mask=batch.mask.long(), domain=None).logits
    distances, balances, sizes = [], [], []
    for row in range(2):
        for place in range(int(batch.mask[row].sum()) - 1):
            own, theirs = (each[row, place].log_softmax(-1) for each in (logits, dense))
            distances.append(float((theirs.exp() * (theirs - own)).sum()))
    for x, part in zip(inputs, model.pathways["code"].blocks, strict=True):
        routed = x @ part.groups.weight.T + part.groups.bias
        chosen = routed.argsort(-1, descending=True)[:, :TOP_K]
        shares = [float((chosen == g).sum()) / chosen.numel() for g in range(GROUPS)]
        wanted = routed.softmax(-1).mean(0)
        balances.append(GROUPS * sum(shares[g] * float(wanted[g]) for g in range(GROUPS)))
        sizes.append(sum(float(row.exp().sum().log()) ** 2 for row in routed) / len(routed))
    assert float(told["loss"]) == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    assert float(told["balance"]) == pytest.approx(sum(balances) / len(balances), rel=1e-4)
    assert float(told["z_loss"]) == pytest.approx(sum(sizes) / len(sizes), rel=1e-4)
    assert all(float(own.sum()) == pytest.approx(1.0) for own in told["shares"])


@pytest.mark.parametrize("refit", [True, False])
def test_all_that_is_trained_has_a_gradient_and_nothing_else(refit):
    model, batch = _model(), _batch()
    student = _student(model, refit=refit, balance=2.0, z_loss=3.0).train()
    told = student(batch.ids, batch.mask)
    told["loss"].backward()
    names = {name.rpartition("_")[2] for name, _ in student.named_parameters()}
    assert names == ({"weight", "bias", "delta"} if refit else {"weight", "bias"})
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
    assert all(p.grad is None for p in model.parameters())
    distance = student.eval()(batch.ids, batch.mask)["loss"]
    expected = distance + 2.0 * told["balance"] + 3.0 * told["z_loss"]
    assert float(told["loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_training_comes_nearer_to_dense_and_is_kept(name, tmp_path):
    model = _model(name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = _train(model)
    report = trained.reports["code"]
    assert report.distances[1] < report.distances[0]
    assert any("entropy" in entry and "balance" in entry for entry in report.history)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.pathways["code"].provenance.get("routers") is None
    old, new = model.pathways["code"].blocks, trained.pathways["code"].blocks
    for mine, theirs in zip(old, new, strict=True):
        assert torch.equal(mine.groups.group, theirs.groups.group)
        assert not torch.equal(mine.groups.weight, theirs.groups.weight)
        assert float(theirs.groups.share.sum()) == pytest.approx(TOP_K, rel=1e-4)
    assert trained.pathways.flops("code") == model.pathways.flops("code")
    model.set_pathways(trained.pathways)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt(2, 9)
    with torch.no_grad():
        logits = loaded(ids, domain="code").logits
        assert torch.allclose(logits, model(ids, domain="code").logits, atol=1e-5)
    (entry,) = loaded.pathways["code"].provenance["routers"]
    assert entry["settings"]["balance"] == 0.01
    assert entry["utilisation"][1]["dead"] == report.utilisation[1].dead
    assert "entropy" in str(trained.sections()[0].header)


def test_a_state_that_is_worse_is_not_kept():
    model = _model()
    trained = _train(model, learning_rate=50.0, refit_rate=50.0)
    report = trained.reports["code"]
    assert report.distances[1] == report.distances[0]
    for mine, theirs in zip(
        model.pathways["code"].blocks, trained.pathways["code"].blocks, strict=True
    ):
        assert torch.equal(mine.groups.weight, theirs.groups.weight)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    model = _model()
    whole = _train(model, work_folder=tmp_path / "whole")
    steps, wrapped = [], Trainer.training_step

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return wrapped(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(model, work_folder=tmp_path / "parts")
    seen = []
    monkeypatch.setattr(
        Trainer, "training_step", lambda *a, **k: (seen.append(1), wrapped(*a, **k))[1]
    )
    found = _train(model, work_folder=tmp_path / "parts")
    assert 0 < len(seen) < 12
    for mine, theirs in zip(
        whole.pathways["code"].blocks, found.pathways["code"].blocks, strict=True
    ):
        assert torch.equal(mine.groups.weight, theirs.groups.weight)
        assert all(torch.equal(a, b) for a, b in zip(
            mine.parts().values(), theirs.parts().values(), strict=True))  # fmt: skip


def test_utilisation_is_the_entropy_of_the_shares():
    even = Utilisation(shares=((0.25,) * 4, (0.25,) * 4))
    assert (even.entropy, even.dead, even.largest) == (pytest.approx(1.0), 0, pytest.approx(1.0))
    one = Utilisation(shares=((1.0, 0.0), (0.5, 0.5)))
    assert (one.entropy, one.dead, one.largest) == (pytest.approx(0.5), 1, pytest.approx(2.0))
    assert Utilisation(shares=((0.9, 0.1),)).entropy == pytest.approx(
        -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    )


@pytest.mark.parametrize(
    ("texts", "error", "told"),
    [
        ({"law": TEXTS["code"]}, PathwaysError, "no groups of neurons"),
        ({"cod": TEXTS["code"]}, UnknownNameError, "Did you mean 'code'"),
        ({}, TextError, "No domains"),
    ],
)
def test_what_cannot_be_trained_is_refused(texts, error, told):
    with pytest.raises(error, match=told):
        _train(_model(), texts)


@pytest.mark.parametrize(
    "fields", [{"balance": -1.0}, {"learning_rate": 0.0}, {"tokens": 0}, {"loss": "kll"}]
)
def test_settings_that_do_not_fit_are_refused(fields):
    with pytest.raises(PathwaysError):
        sp.RouterSettings(**fields)
