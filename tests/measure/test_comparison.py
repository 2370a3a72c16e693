"""Comparisons: every method on the same windows, resumable, and tables that say so."""

import json
import math
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import TextError, UnknownNameError
from hf_sparse_pathways.measure import comparison_steps
from hf_sparse_pathways.measure.comparison import Comparison, compare
from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow
from hf_sparse_pathways.measure.peers import PEERS
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
HELD_OUT = {name: read_documents(documents(name, 6, 20)) for name in ("code", "law")}
MODEL = build("llama")
PROFILE = sp.profile(
    MODEL,
    TOKENIZER,
    {name: documents(name, 12, 30, seed=5) for name in HELD_OUT},
    max_length=64,
)
WHAT = Comparison(
    sparsities=(0.3, 0.5),
    methods=("pathway", "wanda", "griffin", "cats", "prompt", "prompt+domain"),
    max_length=64,
    options={"order": "one-shot"},
)


def _compare(what=WHAT, **options):
    return compare(MODEL, TOKENIZER, PROFILE, HELD_OUT, what, **options)


@pytest.fixture(scope="module")
def report():
    return _compare()


def test_every_method_has_every_domain_and_sparsity(report):
    assert report.sparsities == [0.3, 0.5]
    assert report.domains == ["code", "law"]
    for sparsity in report.sparsities:
        for method in (*WHAT.methods, "pooled", "random", "dense"):
            found = report.find(method, sparsity)
            assert list(found) == ["code", "law"]
            dense = report.find("dense", sparsity)
            for domain, row in found.items():
                assert row.tokens == dense[domain].tokens
                assert row.flops <= 1 - sparsity + 1e-9 or method == "dense"
                ratio = row.perplexity / dense[domain].perplexity
                assert row.ratio == pytest.approx(ratio, rel=1e-6)


def test_only_the_second_part_of_each_window_is_scored(report):
    lengths = [len(TOKENIZER(d.text)["input_ids"]) for d in HELD_OUT["law"].items]
    expected = sum(length - max(1, length // 2) for length in lengths)
    assert report.find("dense", 0.3)["law"].tokens == expected


def test_a_static_row_equals_the_pathway_scored_by_hand(report):
    pathways = sp.select(MODEL, PROFILE, sparsity=0.5, method="wanda", controls=False)
    sparse = sp.SparsePathwaysForCausalLM.from_dense(MODEL, pathways)
    losses = []
    for document in HELD_OUT["code"].items:
        ids = torch.tensor([TOKENIZER(document.text)["input_ids"]])
        with torch.no_grad():
            logits = sparse(ids, domain="code").logits[0].double().log_softmax(-1)
        first = max(1, ids.shape[1] // 2)
        losses += [-float(logits[i - 1, ids[0, i]]) for i in range(first, ids.shape[1])]
    row = report.find("wanda", 0.5)["code"]
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_finished_steps_are_used_again(report, tmp_path, monkeypatch):
    what = replace(WHAT, methods=("pathway", "cats"))
    first = _compare(what, work=tmp_path)
    monkeypatch.setattr(comparison_steps, "select", None)
    monkeypatch.setattr(comparison_steps, "measure_arms", None)
    assert _compare(what, work=tmp_path) == first
    with pytest.raises(TypeError):
        _compare(replace(what, seed=1), work=tmp_path)
    with pytest.raises(TypeError):
        _compare(replace(what, sparsities=(0.4,)), work=tmp_path)
    for method in what.methods:
        rows = [row for row in report.rows if row.method == method]
        assert [row for row in first.rows if row.method == method] == rows


def test_what_was_measured_before_on_the_same_text_is_reported_too(report, tmp_path):
    _compare(WHAT, work=tmp_path)
    _compare(replace(WHAT, seed=1, sparsities=(0.7,), methods=("flap",)), work=tmp_path)
    again = _compare(replace(WHAT, sparsities=(0.4,), methods=("wanda",)), work=tmp_path)
    assert again.sparsities == [0.3, 0.4, 0.5]
    for sparsity in report.sparsities:
        for method in (*WHAT.methods, "pooled", "random"):
            assert again.find(method, sparsity) == report.find(method, sparsity)
    assert list(again.find("wanda", 0.4)) == ["code", "law"]
    assert not again.find("griffin", 0.4)
    assert not any(row.method == "flap" for row in again.rows), "that is of other windows"


def test_a_step_of_other_weights_is_no_finished_step(tmp_path, monkeypatch):
    what = replace(WHAT, methods=("wanda",), sparsities=(0.5,))
    _compare(what, work=tmp_path)
    monkeypatch.setattr(comparison_steps, "measure_arms", None)
    _compare(what, work=tmp_path)
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(TypeError):
        compare(other, TOKENIZER, PROFILE, HELD_OUT, what, work=tmp_path)


@pytest.mark.parametrize("method", ["wanda", "flap", "griffin"])
def test_a_method_gives_the_same_alone_and_beside_others(method):
    what = replace(WHAT, methods=("wanda", "flap", "griffin", "cats"), sparsities=(0.5,))
    beside, alone = (
        _compare(w).find(method, 0.5) for w in (what, replace(what, methods=(method,)))
    )
    assert beside == alone


def test_pathways_that_were_selected_are_measured_again(report, tmp_path, monkeypatch):
    what = replace(WHAT, methods=("pathway", "wanda"))
    measure = comparison_steps.measure_arms
    monkeypatch.setattr(comparison_steps, "measure_arms", None)
    with pytest.raises(TypeError):
        _compare(what, work=tmp_path)
    monkeypatch.setattr(comparison_steps, "measure_arms", measure)
    kept = [path.parent for path in tmp_path.glob("pathway-*/pathways.json")]
    assert [folder.name.startswith(f"pathway-{WHAT.sparsities[0]:g}-") for folder in kept] == [True]
    assert sp.Pathways.from_pretrained(kept[0]).domains == ["code", "law"]
    monkeypatch.setattr(comparison_steps, "select", None)
    with pytest.raises(TypeError):
        _compare(what, work=tmp_path)
    first = [row for row in report.rows if (row.method, row.sparsity) == ("pathway", 0.3)]
    monkeypatch.setattr(comparison_steps, "select", sp.select)
    again = _compare(replace(what, methods=("pathway",)), work=tmp_path).rows
    assert [row for row in again if (row.method, row.sparsity) == ("pathway", 0.3)] == first


def test_what_takes_long_is_kept_domain_by_domain(tmp_path, monkeypatch):
    what = replace(WHAT, sparsities=(0.5,), methods=("one-shot", "random+repair"), options={})
    whole = sp.select(MODEL, PROFILE, sparsity=0.5, order="one-shot", controls=False)
    asked = []

    def select(model, profile, **options):
        asked.append(profile.domains)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return sp.select(model, profile, **options)

    monkeypatch.setattr(comparison_steps, "select", select)
    with pytest.raises(KeyboardInterrupt):
        _compare(what, work=tmp_path)
    report = _compare(what, work=tmp_path)
    assert asked == [["code"], ["law"], ["law"], ["code"], ["law"]]
    assert report == _compare(what)
    for domain, row in report.find("one-shot", 0.5).items():
        (kept,) = (
            found
            for path in tmp_path.glob("one-shot-*/pathways.json")
            if (found := sp.Pathways.from_pretrained(path.parent)).domains == [domain]
        )
        assert row.flops == whole.flops(domain) == kept.flops(domain)
        for mine, theirs in zip(kept[domain].blocks, whole[domain].blocks, strict=True):
            assert torch.equal(mine.keep, theirs.keep)


@pytest.mark.usefixtures("report")
def test_the_model_is_left_as_it_was():
    fresh = build("llama")
    assert list(map(type, MODEL.modules())) == list(map(type, fresh.modules()))
    state = MODEL.state_dict()
    assert all(torch.equal(state[name], value) for name, value in fresh.state_dict().items())


def test_a_table_shows_the_best_first_and_the_json_is_plain(report):
    header, rows = report.table(0.5)
    assert header[2:-1] == ["code", "law"]
    means = [report.geometric_mean(row[0], 0.5) for row in rows]
    assert means == sorted(means)
    assert {row[0] for row in rows} == {*WHAT.methods, "pooled", "random"}
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    again = tuple(ComparisonRow.from_dict(row) for row in data["rows"])
    assert ComparisonReport(base=data["base"], rows=again, settings=data["settings"]) == report
    assert report.to_markdown().count("geometric mean") == 2


def _with_ratios(report, **ratios):
    """Return the rows at 50 % with other ratios: per method, of code and of law."""
    rows = [row for row in report.rows if row.sparsity == 0.5 and row.method in (*ratios, "dense")]
    place = {"code": 0, "law": 1}
    return ComparisonReport(
        base=report.base,
        rows=tuple(
            replace(row, quality=replace(row.quality, ratio=own[place[row.quality.domain]]))
            for row in rows
            for own in [ratios.get(row.method, (1.0, 1.0))]
        ),
    )


def test_the_verdict_names_every_method_that_is_as_good(report):
    best = _with_ratios(report, pathway=(1.1, 1.2), wanda=(1.11, 1.3), random=(9.0, 1.21))
    expected = "No other method of the table is as good as pathway on any domain."
    assert best.verdict("pathway", 0.5) == expected
    beaten = _with_ratios(report, pathway=(1.1, 1.2), wanda=(1.05, 1.3), random=(9.0, 1.2))
    expected = "As good as pathway, or better: random on law, wanda on code."
    assert beaten.verdict("pathway", 0.5) == expected
    assert beaten.to_markdown().endswith(expected)
    assert not _with_ratios(report, pathway=(1.1, 1.2)).verdict("pathway", 0.5)
    assert not _with_ratios(report, wanda=(1.1, 1.2)).verdict("pathway", 0.5)


def test_static_methods_and_their_partners_have_their_roles(report):
    chosen = {row.method for row in report.rows} & {*PEERS, "prompt", "prompt+domain"}
    roles = {row.method: row.quality.role for row in report.rows if row.method not in chosen}
    assert {"griffin", "prompt", "prompt+domain"} <= chosen
    own = {"pathway": "pathway", "wanda": "pathway"}
    assert roles == {**own, "pooled": "pooled", "random": "random", "dense": "dense"}


def test_options_may_be_functions(tmp_path):
    def halves(costs, _):
        return [cost.d_ff // 2 for cost in costs]

    options = {**WHAT.options, "allocation": halves}
    what = replace(WHAT, methods=("pathway",), sparsities=(0.5,), options=options)
    assert _compare(what, work=tmp_path) == _compare(what, work=tmp_path)


def test_unknown_methods_are_refused_with_a_hint():
    with pytest.raises(UnknownNameError, match="Did you mean 'wanda'"):
        _compare(replace(WHAT, methods=("wand",)))


def test_documents_without_a_scored_token_are_left_out(tmp_path):
    texts = {name: read_documents(["x", *documents(name, 2, 20)]) for name in HELD_OUT}
    what = replace(WHAT, sparsities=(0.3,), methods=("wanda",))
    report = compare(MODEL, TOKENIZER, PROFILE, texts, what, work=tmp_path)
    assert all(math.isfinite(end) for row in report.rows for end in row.quality.interval)
    assert report == compare(MODEL, TOKENIZER, PROFILE, texts, what, work=tmp_path)
    nothing = {name: read_documents(["x"]) for name in HELD_OUT}
    with pytest.raises(TextError, match="two tokens"):
        compare(MODEL, TOKENIZER, PROFILE, nothing, what)


def test_a_step_of_other_code_is_said(tmp_path, caplog, monkeypatch):
    what = replace(WHAT, sparsities=(0.3,), methods=("wanda",))
    first = _compare(what, work=tmp_path)
    assert _compare(what, work=tmp_path) == first
    assert caplog.text == ""
    monkeypatch.setattr(comparison_steps, "code_digest", lambda: "another")
    assert _compare(what, work=tmp_path) == first
    assert "was measured by other code" in caplog.text


def test_pathways_that_other_code_selected_are_selected_anew(tmp_path, monkeypatch):
    what = replace(WHAT, sparsities=(0.3,), methods=("wanda",))
    _compare(what, work=tmp_path)
    records = list(tmp_path.glob("wanda-*.json"))
    for record in records:
        record.unlink()
    monkeypatch.setattr(comparison_steps, "select", None)
    _compare(what, work=tmp_path)  # they are there
    records[0].unlink()
    monkeypatch.setattr(comparison_steps, "code_digest", lambda: "another")
    with pytest.raises(TypeError):
        _compare(what, work=tmp_path)


def test_held_out_text_that_another_domain_was_calibrated_on_is_left_out():
    calibrated = [window.document for window in PROFILE["law"].windows[:2]]
    mixed = read_documents([*documents("code", 6, 20), *(d.text for d in calibrated)])
    what = replace(WHAT, sparsities=(0.3,), methods=("wanda",))
    found = compare(MODEL, TOKENIZER, PROFILE, {**HELD_OUT, "code": mixed}, what)
    clean = _compare(what)
    for row, expected in zip(found.rows, clean.rows, strict=True):
        excluded = 2 if row.quality.domain == "code" else 0
        assert row.quality == replace(expected.quality, excluded=excluded)
    nothing = read_documents([document.text for document in calibrated])
    with pytest.raises(TextError, match="calibration text of another domain"):
        compare(MODEL, TOKENIZER, PROFILE, {**HELD_OUT, "code": nothing}, what)


def test_a_method_that_does_not_fit_is_named(caplog):
    what = replace(WHAT, sparsities=(0.7,), methods=("cats", "wanda"))
    assert {row.method for row in _compare(what).rows} == {"dense", "wanda"}
    assert "cats cannot be measured with 70%" in caplog.text


def test_random_costs_what_a_pathway_with_a_bypass_costs():
    profile = sp.profile(
        MODEL,
        TOKENIZER,
        {name: documents(name, 12, 30, seed=5) for name in HELD_OUT},
        max_length=64,
        inputs=True,
    )
    options = {"order": "one-shot", "compensation": "refit+bias+bypass:8"}
    what = replace(WHAT, sparsities=(0.3,), methods=("pathway",), options=options)
    report = compare(MODEL, TOKENIZER, profile, HELD_OUT, what)
    neuron = 1 / MODEL.config.intermediate_size
    for domain, row in report.find("random", 0.3).items():
        flops = report.find("pathway", 0.3)[domain].flops
        assert flops - neuron < row.flops <= flops + 1e-9


def test_the_settings_are_told(report):
    assert report.settings == {
        "scored_tokens": 16384,
        "batch_size": 2,
        "precision": "model",
        "products": "float32",
        "options": {"order": "one-shot"},
        "seed": 0,
        "max_length": 64,
        "version": sp.__version__,
        "calibration_tokens": {name: PROFILE[name].tokens for name in HELD_OUT},
    }
