"""From pathways and text to healed pathways, beside the dense model tuned equally."""

import json
import math

import peft
import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.trials import batch_loss, run_model
from hf_sparse_pathways.discovery.windows import make_batches
from hf_sparse_pathways.healing import checkpoints, healing, training
from hf_sparse_pathways.pathways.names import TUNED
from tests.architectures import build, compensate, prompt, random_masks
from tests.healing.healings import TEXTS, heal, parts, same, sparse, text, watch_batches
from tests.texts import documents, tiny_tokenizer

IDS = prompt(2, 9)


@pytest.fixture(scope="module")
def healed():
    model = sparse()
    return model, heal(model, steps=12, dense_partner=True)


@pytest.mark.parametrize("train", ["lora", "weights"])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt"])
def test_the_loss_goes_down_and_the_folded_pathway_has_it(name, train):
    model = sparse(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = parts(model.pathways)
    rate = {"lora": 3e-2, "weights": 5e-3}[train]
    result = heal(model, train=train, steps=12, loss="lm+kl:0.1", learning_rate=rate)
    report = result.reports["code"]
    assert report.healed < report.before - 0.05
    assert report.healed == pytest.approx(min(p.validation for p in report.curve), abs=5e-3)
    assert report.before == report.curve[0].validation
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in parts(model.pathways).items())
    assert not same(result.pathways, model.pathways)
    perplexities = []
    for pathways in (model.pathways, result.pathways):
        model.set_pathways(pathways)
        report = sp.evaluate(model, tiny_tokenizer(), {"code": TEXTS}, seen="include")
        perplexities += [row.perplexity for row in report.rows if row.role == "pathway"]
    assert perplexities[1] < 0.95 * perplexities[0]


def test_only_the_healed_domain_changes(healed):
    model, result = healed
    assert result.pathways["law"] is model.pathways["law"]
    assert list(result.pathways.by_domain) == ["code", "law"]
    for new, old in zip(result.pathways["code"].keep, model.pathways["code"].keep, strict=True):
        assert torch.equal(new, old)


def test_the_run_is_in_the_provenance_and_its_documents_are_seen(healed, tmp_path):
    model, result = healed
    result.pathways.save_pretrained(tmp_path)
    read = sp.Pathways.from_pretrained(tmp_path)
    (entry,) = read["code"].provenance["healing"]
    report = result.reports["code"]
    assert entry == json.loads(json.dumps(report.to_dict()))
    assert entry["settings"]["learning_rate"] == 5e-3
    assert entry["tokens"] == report.curve[-1].tokens > 0
    model = sp.SparsePathwaysForCausalLM.from_dense(model.to_dense(), read)
    seen = read["code"].provenance["text"]
    known = {*seen["digests"], *seen["validation_digests"]}
    rows = sp.evaluate(model, tiny_tokenizer(), {"code": TEXTS}, controls=False).rows
    assert [row.excluded for row in rows] == [len(known)] * len(rows)
    assert len(known) > 20
    again = heal(model)
    assert len(again.pathways["code"].provenance["healing"]) == 2


def test_the_partner_is_a_control_with_the_loss_that_is_reported(healed):
    model, result = healed
    report = result.reports["code"]
    assert report.tuned < report.dense
    assert report.tuned == min(point.validation for point in report.dense_curve)
    assert report.ratio_before == pytest.approx(math.exp(report.before - report.dense))
    assert report.ratio == pytest.approx(math.exp(report.healed - report.dense))
    assert report.ratio_tuned == pytest.approx(math.exp(report.tuned - report.dense))
    assert report.honest_ratio == pytest.approx(report.ratio / report.ratio_tuned)
    name = f"{TUNED}code"
    assert result.pathways.sparsity(name) == 0.0
    assert result.pathways.flops(name) == 1.0
    model = sp.SparsePathwaysForCausalLM.from_dense(model.to_dense(), result.pathways)
    with torch.no_grad():
        tuned, dense = model(IDS, domain=name).logits, model(IDS).logits
    assert not torch.allclose(tuned, dense, atol=1e-3)
    rows = sp.evaluate(model, tiny_tokenizer(), {"code": documents("code", seed=5)}).rows
    roles = {row.role: row for row in rows}
    assert roles["tuned"].pathway == name
    assert roles["tuned"].perplexity < roles["dense"].perplexity


def test_the_partner_sees_the_same_batches_with_changes_of_the_same_rank(monkeypatch):
    seen = watch_batches(monkeypatch)
    heal(sparse(), dense_partner=True, loss="lm+kl")
    partner, student = seen.values()
    assert partner["batches"] == student["batches"]
    assert partner["objective"].terms == {"lm": 1.0}
    names = [
        [n for n, p in record["model"].named_parameters() if p.requires_grad]
        for record in (partner, student)
    ]
    assert names[0] == names[1] != []


@pytest.mark.parametrize("teacher", ["dense", "tuned"])
def test_the_teacher_is_dense_and_never_the_student(teacher, monkeypatch):
    seen = watch_batches(monkeypatch)
    model = sparse()
    heal(model, dense_partner=True, loss="kl", teacher=teacher)
    partner, student = seen.values()
    teaching = student["objective"].teacher
    assert (teaching is partner["model"]) == (teacher == "tuned")
    with torch.no_grad():
        found, dense = teaching(IDS).logits, model(IDS).logits
    assert torch.allclose(found, dense, atol=1e-5) == (teacher == "dense")
    assert not any("lora" in name for name, _ in teaching.named_parameters()) or teacher == "tuned"


def test_a_pathway_that_was_healed_has_no_equal_partner(healed):
    model, result = healed
    again = sp.SparsePathwaysForCausalLM.from_dense(model.to_dense(), result.pathways).eval()
    for settings in ({"dense_partner": True}, {"dense_first": 0.5}):
        with pytest.raises(sp.PathwaysError, match="was healed before"):
            heal(again, **settings)
    with pytest.raises(sp.PathwaysError, match="two steps or more"):
        heal(model, steps=1, dense_first=0.5)


@pytest.mark.parametrize("train", ["lora", "weights"])
def test_how_a_step_is_cut_into_passes_changes_nothing(train):
    whole = heal(sparse(), train=train, batch_size=4, accumulate=1)
    parted = heal(sparse(), train=train, batch_size=1, accumulate=4)
    first, second = parts(whole.pathways), parts(parted.pathways)
    assert all(torch.allclose(first[n].float(), second[n].float(), atol=1e-2) for n in first)
    losses = [[p.validation for p in r.reports["code"].curve] for r in (whole, parted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


class _Stopped(Exception):
    pass


def _stop_after(steps, monkeypatch):
    """Interrupt a run in the middle of a step."""
    counted = []
    step = training._Run._step

    def counting(self, windows):
        counted.append(windows)
        if len(counted) > steps:
            raise _Stopped
        return step(self, windows)

    monkeypatch.setattr(training._Run, "_step", counting)


@pytest.mark.parametrize(
    ("train", "steps", "share"),
    [
        ("lora", 0, 0.0),
        ("lora", 4, 0.0),
        ("weights", 9, 0.0),
        ("weights", 2, 0.5),
        ("lora", 4, 0.5),
        ("weights", 7, 0.5),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    train, steps, share, tmp_path, monkeypatch
):
    settings = {"train": train, "dense_partner": True, "teacher": "tuned", "loss": "lm+kl"}
    settings["dense_first"] = share
    whole = heal(sparse(), **settings)
    monkeypatch.setattr(checkpoints, "STORE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        _stop_after(steps, patch)
        with pytest.raises(_Stopped):
            heal(sparse(), work_folder=tmp_path, **settings)
    with monkeypatch.context() as patch:
        taken = []
        step = training._Run._step
        patch.setattr(training._Run, "_step", lambda run, w: taken.append(w) or step(run, w))
        resumed = heal(sparse(), work_folder=tmp_path, **settings)
    assert len(taken) == 12 - round(6 * share) - steps, "steps that were taken are not taken again"
    assert same(whole.pathways, resumed.pathways)
    curves = [
        [(p.step, p.tokens, p.training, p.validation) for p in result.reports["code"].curve]
        for result in (whole, resumed)
    ]
    assert curves[0] == curves[1]
    other = heal(sparse(), work_folder=tmp_path, **{**settings, "learning_rate": 1e-3})
    assert not same(other.pathways, whole.pathways), "other settings never pick it up"


def test_a_run_that_brings_nothing_more_is_stopped_and_its_best_state_kept():
    report = heal(sparse(), learning_rate=3.0, steps=40, validations=20, patience=2).reports["code"]
    losses = [point.validation for point in report.curve]
    assert report.curve[-1].step < 40
    assert min(losses[:-2]) < min(losses[-2:])
    assert report.healed == pytest.approx(min(losses), abs=5e-3)


def test_two_domains_are_healed_apart():
    texts = {"code": TEXTS, "law": documents("law", count=30)}
    both = heal(sparse(), texts)
    alone = heal(sparse(), {"law": texts["law"]})
    assert list(both.reports) == ["code", "law"]
    mine, theirs = parts(both.pathways, "law"), parts(alone.pathways, "law")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("attention", [False, True])
def test_a_lora_can_be_kept_as_an_adapter(attention, share, tmp_path):
    model = sparse()
    result = heal(model, keep="lora", attention=attention, dense_first=share, steps=12)
    report = result.reports["code"]
    assert report.healed < report.before
    seen = result.pathways["code"].provenance["text"]["digests"]
    assert seen == sorted({w.document.digest for step in text(steps=12).steps for w in step})
    assert same(result.pathways, model.pathways)
    result.adapters["code"].save_pretrained(tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert any("q_proj" in name for name in names) == attention
    adapted = peft.PeftModel.from_pretrained(model, tmp_path)
    with torch.no_grad():
        batches = list(make_batches(text().validation, 2))
        losses = [batch_loss(run_model(adapted, batch, domain="code"), batch) for batch in batches]
    loss = sum(total for total, _ in losses) / sum(count for _, count in losses)
    assert loss == pytest.approx(report.healed, abs=1e-4)


def test_bfloat16_products_and_weights_work():
    model = sparse().to(torch.bfloat16)
    result = heal(model, precision="bfloat16", steps=12, dense_partner=True)
    report = result.reports["code"]
    assert report.healed < report.before
    stored = {part.dtype for name, part in parts(result.pathways).items() if "incoming" in name}
    assert stored == {torch.bfloat16}


def test_what_does_not_fit_is_refused(monkeypatch):
    model = sparse()
    with pytest.raises(sp.PathwaysError, match="from_dense"):
        heal(model.to_dense())
    with pytest.raises(sp.PathwaysError, match="Unknown domain 'medicine'"):
        heal(model, {"medicine": TEXTS})
    with pytest.raises(sp.PathwaysError, match="No domains"):
        heal(model, {})
    with pytest.raises(sp.PathwaysError, match="Did you mean 'bfloat16'"):
        heal(model, precision="bfloat")
    with pytest.raises(sp.PathwaysError, match="positions"):
        heal(model, max_length=4096)
    with pytest.raises(sp.PathwaysError, match="routed experts"):
        heal(sparse("qwen3_moe"), keep="lora")
    with pytest.raises(sp.PathwaysError, match=r"learning rate|loss is nan"):
        heal(model, learning_rate=1e30)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(sp.PathwaysError, match=r"hf-sparse-pathways\[peft\]"):
        heal(model)
    assert heal(model, train="weights").reports, "whole weights need no PEFT"


def test_a_model_that_computes_more_than_its_leaves_show_is_refused(monkeypatch):
    dense = build("llama")
    paths = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    make = healing.make_student

    def wrong(frozen, blocks):
        made = make(frozen, blocks)
        made.model.lm_head.weight = torch.nn.Parameter(made.model.lm_head.weight * 1.1)
        return made

    monkeypatch.setattr(healing, "make_student", wrong)
    with pytest.raises(sp.PathwaysError, match="cannot be healed"):
        heal(model)


@pytest.mark.parametrize("keep", ["folded", "lora"])
def test_the_partner_of_an_earlier_healing_is_none_of_the_next(healed, keep):
    model, result = healed
    tuned = sp.SparsePathwaysForCausalLM.from_dense(model.to_dense(), result.pathways).eval()
    assert f"{TUNED}code" in tuned.pathways.controls
    assert heal(tuned, steps=2, keep=keep).pathways.controls == {}
    assert f"{TUNED}code" in tuned.pathways.controls


def test_a_model_in_training_mode_is_healed_as_one_that_evaluates():
    dense = build("gpt2")
    for module in dense.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    paths = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    expected = heal(model.eval(), steps=2).pathways
    assert same(heal(model.train(), steps=2).pathways, expected)
    assert model.training
