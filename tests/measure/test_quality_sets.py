"""Several sets of pathways in one report: each as if it were alone, on the same windows."""

import json
import logging
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.errors import MismatchError, PathwaysError, TextError
from hf_sparse_pathways.measure.figures import format_figure
from hf_sparse_pathways.measure.quality import evaluate
from hf_sparse_pathways.pathways.names import TUNED
from hf_sparse_pathways.pathways.pathway import Pathways
from tests.architectures import build, random_masks
from tests.measure.test_quality import CALIBRATION, TEXTS, TOKENIZER
from tests.texts import documents

ROLES = ["pathway", "pooled", "random", "other"]
OTHER_TEXTS = {name: documents(name, 4, 20, seed=7) for name in TEXTS}
SHARES = {"quarter": 0.25, "three quarters": 0.75}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request):
    dense = build(request.param)
    taken = profile(dense, TOKENIZER, CALIBRATION, max_length=64)
    other = profile(dense, TOKENIZER, OTHER_TEXTS, max_length=64)
    options = {"allocation": "uniform", "controls": True}
    own = sp.select(dense, taken, sparsity=0.5, **options)
    also = {
        name: sp.select(dense, other, sparsity=share, **options) for name, share in SHARES.items()
    }
    return dense, own, also


def _model(dense, pathways):
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)


def _evaluate(model, texts=TEXTS, **options):
    return evaluate(model, TOKENIZER, texts, **{"max_length": 64, **options})


@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_every_set_is_measured_as_if_it_were_alone(case, executor):
    dense, own, also = case
    model = _model(dense, own)
    model.set_executor(executor)
    report = _evaluate(model, also=also, label="half")
    assert report.sets == ["half", *SHARES]
    assert report.domains == list(TEXTS)
    for label, pathways in {"half": own, **also}.items():
        alone = _model(dense, pathways)
        alone.set_executor(executor)
        expected = _evaluate(alone)
        for domain in TEXTS:
            rows = report.of(domain, label)
            assert [row.role for row in rows] == ROLES
            assert [replace(row, set=None) for row in rows] == list(expected.of(domain))[1:]
            for row in rows:
                wanted = 0.5 if label == "half" else SHARES[label]
                assert row.sparsity == pytest.approx(wanted)
                assert row.flops == pytest.approx(1 - wanted)


def test_dense_is_measured_once_per_domain(case):
    dense, own, also = case
    calls = []
    model = _model(dense, own)
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    report = _evaluate(model, {"code": TEXTS["code"]}, also=also, batch_size=64)
    handle.remove()
    assert len(calls) == 1 + 3 * len(ROLES)
    assert [row.set for row in report.rows if row.role == "dense"] == [None]
    assert len(report.rows) == 1 + 3 * len(ROLES)


def test_without_controls_each_set_has_its_own_pathway_only(case):
    dense, own, also = case
    report = _evaluate(_model(dense, own), also=also, controls=False)
    found = [(row.role, row.set) for row in report.of("law")]
    assert found == [("dense", None), *(("pathway", name) for name in ("model", *SHARES))]


def test_one_set_is_shown_as_ever(case):
    dense, own, _ = case
    report = _evaluate(_model(dense, own))
    assert report == _evaluate(_model(dense, own), also={}, label="whatever")
    assert report.sets == []
    assert {row.set for row in report.rows} == {None}
    assert "set" not in report.table("code")[0]
    header, rows = report.matrix()
    assert header == ["text", "code", "law", "pooled", "random"]
    assert [row[0] for row in rows] == ["code", "law"]
    assert len([line for line in str(report).splitlines() if line.startswith("|---")]) == 3


def test_tables_say_which_set_and_each_set_has_its_matrix(case):
    dense, own, also = case
    report = _evaluate(_model(dense, own), also=also, label="half")
    header, rows = report.table("code")
    assert header[:3] == ["model", "set", "FFN FLOPs"]
    assert [row[1] for row in rows] == ["-", *(n for n in ("half", *SHARES) for _ in ROLES)]
    assert all(len(row) == len(header) for row in rows)
    assert [row[2] for row in rows if row[0] == "pathway code"] == ["50.0%", "75.0%", "25.0%"]
    text = str(report)
    for label, share in (("half", "50%"), ("quarter", "25%"), ("three quarters", "75%")):
        assert f"**{label}, {share} of the FFN neurons removed. Perplexity ratio" in text
        header, rows = report.matrix(label)
        assert header == ["text", "code", "law", "pooled", "random"]
        for domain, line in zip(TEXTS, rows, strict=True):
            ratios = {row.pathway: row.ratio for row in report.of(domain, label)}
            shown = [*header[1:-1], f"random: {domain}"]
            assert line == [domain, *(format_figure(ratios[name]) for name in shown)]
    assert len([line for line in text.splitlines() if line.startswith("|---")]) == 2 + 3
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {row["set"] for row in values["rows"]} == {None, "half", *SHARES}


def test_documents_that_any_set_was_calibrated_on_are_left_out(case):
    dense, own, also = case
    mixed = {"code": [*TEXTS["code"], *OTHER_TEXTS["code"], OTHER_TEXTS["law"][0]]}
    mixed["code"] += CALIBRATION["code"][:2]
    model = _model(dense, own)
    report = _evaluate(model, mixed, also=also)
    assert {row.excluded for row in report.rows} == {5 + 2}
    assert {row.documents for row in report.rows} == {len(TEXTS["code"])}
    clean = _evaluate(model, {"code": TEXTS["code"]}, also=also)
    assert [replace(row, excluded=0) for row in report.rows] == list(clean.rows)
    assert {row.excluded for row in _evaluate(model, mixed).rows} == {2}, "of its own set alone"
    with pytest.raises(TextError, match="calibrated on 1 of the"):
        _evaluate(model, {"law": [*TEXTS["law"], OTHER_TEXTS["code"][0]]}, also=also, seen="refuse")


def test_a_tuned_partner_is_that_of_its_set(case):
    dense, own, also = case
    other = also["quarter"]
    tuned = replace(other, controls={f"{TUNED}code": own["law"]})
    report = _evaluate(_model(dense, own), {"code": TEXTS["code"]}, also={"healed": tuned})
    by_role = {(row.set, row.role): row for row in report.rows}
    assert ("model", "tuned") not in by_role
    assert ("healed", "pooled") not in by_role
    row = by_role["healed", "tuned"]
    assert row.perplexity == by_role["model", "other"].perplexity
    assert row.flops == own.flops("law")


def _interrupted(model, also):
    handle = model.lm_head.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        _evaluate(model, also=also)
    handle.remove()


def _fail(*_):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("run", [lambda m, also: _evaluate(m, also=also), _interrupted])
def test_the_model_is_left_as_it_was(case, run):
    dense, own, also = case
    model = _model(dense, own).train()
    model.config.default_domain = "law"
    controls = [dict(pathways.controls) for pathways in also.values()]
    run(model, also)
    assert model.pathways is own
    assert model.domains == model.config.domains == ["code", "law"]
    assert list(model._named) == ["code", "law", "pooled"]
    assert model.training
    assert [dict(pathways.controls) for pathways in also.values()] == controls
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = _model(dense, own)(ids, domain="code").logits
        assert torch.equal(model.eval()(ids, domain="code").logits, expected)


def test_labels_have_to_differ_and_to_fit_in_a_table(case):
    dense, own, also = case
    model = _model(dense, own)
    with pytest.raises(PathwaysError, match="Two sets of pathways are called 'quarter'"):
        _evaluate(model, also=also, label="quarter")
    for label in ("", " ", "a|b", "a\nb", 5):
        with pytest.raises(PathwaysError, match="cannot be the label"):
            _evaluate(model, also={label: own})
        with pytest.raises(PathwaysError, match="cannot be the label"):
            _evaluate(model, also=also, label=label)


def test_what_cannot_be_measured_beside_is_refused_by_its_label(case):
    dense, own, also = case
    model = _model(dense, own)
    strange = build("opt")
    foreign = Pathways.from_masks(strange, random_masks(strange))
    with pytest.raises(MismatchError, match=r"'far' does not fit.*opt"):
        _evaluate(model, also={**also, "far": foreign})
    with pytest.raises(PathwaysError, match=r"'narrow' lacks the domain 'law'.*it has 'code'"):
        _evaluate(model, also={"narrow": own.subset(["code"])})
    with pytest.raises(PathwaysError, match=r"'there' is a str.*from_pretrained"):
        _evaluate(model, also={"there": "folder"})
    assert model.pathways is own


def test_a_set_may_have_domains_that_the_model_lacks(case):
    dense, own, also = case
    model = _model(dense, own.subset(["code"]))
    report = _evaluate(model, {"code": TEXTS["code"]}, also=also)
    assert [row.pathway for row in report.of("code", "model") if row.role == "other"] == []
    assert [row.pathway for row in report.of("code", "quarter") if row.role == "other"] == ["law"]
    assert report.columns("model") == ["code", "pooled"]


@pytest.mark.parametrize(
    ("names", "warned"),
    [(("a/tiny", "b/Tiny"), False), (("a/tiny", "a/large"), True), (("", "a/large"), False)],
)
def test_pathways_of_a_base_of_another_name_are_warned_of(case, caplog, names, warned):
    dense, own, also = case
    own, other = (
        replace(given, base=replace(given.base, name=name))
        for given, name in zip((own, also["quarter"]), names, strict=True)
    )
    with caplog.at_level(logging.WARNING, logger="hf_sparse_pathways"):
        _evaluate(_model(dense, own), {"code": TEXTS["code"]}, also={"quarter": other})
    assert ("'quarter' was made for a/large" in caplog.text) == warned
