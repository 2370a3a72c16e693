"""Perplexities against a naive computation, and partners that are what they say."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.documents import Document
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.measure.quality import evaluate, random_partner
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from tests.architectures import build, random_masks, repaired, zeroed
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Lengths differ, so that batches are padded; each document is one window.
TEXTS = {
    name: [text for words in (2, 9, 15) for text in documents(name, 3, words)]
    for name in ("code", "law")
}
CALIBRATION = {name: documents(name, 4, 20, seed=9) for name in TEXTS}


@torch.no_grad()
def _naive(model, texts):
    """Return the perplexity and tokens of plain passes over single documents, in float64."""
    losses = []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        logits = model(ids).logits[0, :-1].double()
        losses.extend(functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def case(request):
    dense = build(request.param)
    pathways = select(dense, profile(dense, TOKENIZER, CALIBRATION, max_length=64), sparsity=0.5)
    return dense, sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)


def _model(masks=None, architecture="llama"):
    dense = build(architecture)
    pathways = Pathways.from_masks(dense, masks or random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)


def _evaluate(model, texts=TEXTS, **options):
    return evaluate(model, TOKENIZER, texts, **{"max_length": 64, **options})


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_perplexities_equal_naive_ones(case, batch_size, executor):
    dense, model = case
    model.set_executor(executor)
    report = _evaluate(model, batch_size=batch_size)
    assert report.domains == list(TEXTS)
    for row in report.rows:
        plain = dense
        if row.role in ("pathway", "other", "pooled"):
            plain = repaired(dense, model.pathways[row.pathway])
        elif row.role == "random":
            partner = random_partner(model.pathways[row.domain], model.pathways.base.blocks, 0)
            plain = zeroed(dense, partner.keep)
        expected, tokens = _naive(plain, TEXTS[row.domain])
        assert row.perplexity == pytest.approx(expected, rel=1e-4), (row.domain, row.role)
        assert (row.tokens, row.documents, row.excluded) == (tokens, len(TEXTS[row.domain]), 0)


def test_every_domain_has_its_partners(case):
    _, model = case
    report = _evaluate(model)
    for domain, other in (("code", "law"), ("law", "code")):
        roles = [(row.role, row.pathway) for row in report.of(domain)]
        assert roles[:3] == [("dense", None), ("pathway", domain), ("pooled", "pooled")]
        assert [role for role, _ in roles[3:]] == ["random", "other"]
        assert roles[4][1] == other
        dense = report.of(domain)[0]
        assert (dense.ratio, dense.flops) == (1.0, 1.0)
        for row in report.of(domain):
            assert row.ratio == pytest.approx(row.perplexity / dense.perplexity)
            assert row.tokens == dense.tokens
            if row.role in ("pathway", "other", "pooled"):
                assert row.flops == pytest.approx(model.pathways.flops(row.pathway))
    json.dumps(report.to_dict(), allow_nan=False)


def test_controls_are_optional_and_pooled_only_where_it_is(case):
    _, model = case
    report = _evaluate(model, controls=False)
    assert [row.role for row in report.rows] == ["dense", "pathway"] * 2
    assert [row.role for row in _evaluate(_model()).of("law")] == [
        "dense",
        "pathway",
        "random",
        "other",
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_partner_keeps_as_many_of_each_block(seed):
    model = build("deepseek_v3")
    pathway = Pathway.from_keep(random_masks(model, keep=0.3)["code"])
    before = [mask.clone() for mask in pathway.keep]
    shapes = BaseModel.of(model).blocks
    partner, again = (random_partner(pathway, shapes, seed) for _ in range(2))
    for mine, theirs in zip(pathway.blocks, partner.blocks, strict=True):
        assert mine.kept == theirs.kept
        assert mine.keep.shape == theirs.keep.shape
    assert all(map(torch.equal, partner.keep, again.keep))
    assert not all(map(torch.equal, partner.keep, pathway.keep))
    assert not all(map(torch.equal, partner.keep, random_partner(pathway, shapes, seed + 1).keep))
    assert all(map(torch.equal, pathway.keep, before))


def test_random_rows_cost_what_their_pathway_costs():
    """Also for names that look like a partner's."""
    dense = build("llama")
    masks = {"law": random_masks(dense, ["a"], keep=0.8)["a"]}
    masks["random law"] = random_masks(dense, ["a"], keep=0.2)["a"]
    report = _evaluate(_model(masks), {"law": TEXTS["law"]})
    rows = {row.role: row for row in report.rows}
    assert rows["random"].flops == rows["pathway"].flops
    assert rows["random"].perplexity != rows["other"].perplexity


def test_the_budget_counts_tokens_and_windows_are_scored_alone():
    model = _model()
    report = _evaluate(model, {"code": [" ".join(TEXTS["code"])]}, max_tokens=50, max_length=10)
    assert {row.tokens for row in report.rows} <= set(range(30, 50)), "one per window is context"
    whole = _evaluate(model, {"code": [" ".join(TEXTS["code"])]}, max_length=128)
    assert whole.rows[0].tokens == len(TOKENIZER(" ".join(TEXTS["code"]))["input_ids"]) - 1


def test_evaluations_are_deterministic():
    model = _model()
    assert _evaluate(model) == _evaluate(model)
    rows = [_evaluate(model, seed=seed).rows for seed in (0, 1)]
    random_rows = [[row.perplexity for row in given if row.role == "random"] for given in rows]
    assert random_rows[0] != random_rows[1]


def test_calibration_documents_of_any_domain_are_left_out(case):
    _, model = case
    mixed = {"code": [*TEXTS["code"], *CALIBRATION["code"], CALIBRATION["law"][0]]}
    report = _evaluate(model, mixed)
    clean = _evaluate(model, {"code": TEXTS["code"]})
    assert [replace(row, excluded=0) for row in report.rows] == list(clean.rows)
    assert {row.excluded for row in report.rows} == {5}
    assert {row.documents for row in report.rows} == {len(TEXTS["code"])}


def test_white_space_does_not_hide_a_calibration_document(case):
    _, model = case
    mixed = {"law": [*TEXTS["law"], f"\n {CALIBRATION['law'][1]} \n"]}
    assert {row.excluded for row in _evaluate(model, mixed).rows} == {1}


def test_seen_documents_can_be_refused(case):
    _, model = case
    mixed = {"code": [*TEXTS["code"], CALIBRATION["law"][0]]}
    with pytest.raises(TextError, match=rf"calibrated on 1 of the {len(TEXTS['code']) + 1}"):
        _evaluate(model, mixed, seen="refuse")
    clean = {"code": TEXTS["code"]}
    assert _evaluate(model, clean, seen="refuse") == _evaluate(model, clean)


@torch.no_grad()
def _naive_fidelity(dense, arm, texts):
    """Return KL, agreement and final cosine of single documents, token by token in float64."""
    rows = []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        outputs = [m(ids, output_hidden_states=True) for m in (dense, arm)]
        ours, theirs = (output.logits[0, :-1].double().log_softmax(-1) for output in outputs)
        states = [output.hidden_states[-1][0, :-1].double() for output in outputs]
        for index in range(len(ours)):
            kl = float((ours[index].exp() * (ours[index] - theirs[index])).sum())
            same = float(ours[index].argmax() == theirs[index].argmax())
            cosine = float(functional.cosine_similarity(*(s[index] for s in states), dim=0))
            rows.append((kl, same, cosine))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_divergence_agreement_and_cosine_equal_naive_ones(case):
    dense, model = case
    for row in _evaluate(model).rows:
        if row.role not in ("pathway", "other"):
            continue
        plain = repaired(dense, model.pathways[row.pathway])
        expected = _naive_fidelity(dense, plain, TEXTS[row.domain])
        found = [row.divergence, row.agreement, row.cosine]
        assert found == pytest.approx(expected, abs=1e-4), (row.domain, row.pathway)
        assert len(row.cosine_per_layer) == 3 or len(row.cosine_per_layer) == 2
    first = _evaluate(model).rows[0]
    assert (first.divergence, first.agreement, first.cosine) == (0.0, 1.0, 1.0)


def test_bits_per_byte_count_the_text_of_the_scored_tokens():
    text = "the court of law"
    row = _evaluate(_model(), {"law": [text]}).rows[0]
    scored = TOKENIZER.decode(TOKENIZER(text)["input_ids"][1:])
    bits = math.log2(row.perplexity) * row.tokens
    assert row.bits_per_byte == pytest.approx(bits / len(scored.encode()))


def test_intervals_hold_the_ratio_and_need_two_documents(case):
    _, model = case
    for row in _evaluate(model).rows:
        low, high = row.interval
        assert low <= row.ratio <= high
    alone = _evaluate(model, {"law": TEXTS["law"][-1:]}).rows
    assert {row.interval for row in alone} == {None}


def test_all_seen_is_refused_and_can_be_included(case):
    _, model = case
    with pytest.raises(TextError, match=rf"all {len(CALIBRATION['code'])} documents"):
        _evaluate(model, {"code": CALIBRATION["code"]})
    report = _evaluate(model, {"code": CALIBRATION["code"]}, seen="include")
    assert {row.documents for row in report.rows} == {len(CALIBRATION["code"])}
    expected, _ = _naive(case[0], CALIBRATION["code"])
    assert report.rows[0].perplexity == pytest.approx(expected, rel=1e-4)


def test_held_out_documents_of_a_split_are_unseen():
    dense = build("llama")
    read = read_documents([*TEXTS["law"], *CALIBRATION["law"]])
    calibration, held_out = read.split(0.4)
    taken = profile(dense, TOKENIZER, {"law": calibration}, max_length=64)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, select(dense, taken))
    row = _evaluate(model, {"law": read}).rows[0]
    assert (row.documents, row.excluded) == (len(held_out.items), len(calibration.items))


def _state(model):
    return [
        (module.training, list(module._forward_pre_hooks), list(module._forward_hooks))
        for module in model.modules()
    ]


def _interrupted(model):
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate(model, _Broken(), TEXTS)
    handle = model.lm_head.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        _evaluate(model)
    handle.remove()


def _fail(*_):
    raise RuntimeError("in the middle")


class _Broken:
    def __call__(self, *_, **__):
        _fail()


@pytest.mark.parametrize("run", [_evaluate, _interrupted], ids=["evaluated", "interrupted"])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_the_model_is_left_as_it_was(run, mode):
    model = _model().train(mode != "eval")
    if mode == "mixed":
        model.model.layers[1].eval()
    model.config.default_domain = "law"
    before, weights = _state(model), copy.deepcopy(model.state_dict())
    pathways = model.pathways
    with model.pathway("code"):
        run(model)
        with torch.no_grad():
            ids = torch.tensor([[5, 6, 7]])
            assert torch.equal(model(ids).logits, model(ids, domain="code").logits)
    assert model.pathways is pathways
    assert model.domains == model.config.domains == ["code", "law"]
    assert model.config.default_domain == "law"
    assert _state(model) == before
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_whose_leaves_are_wrapped_can_be_measured():
    peft = pytest.importorskip("peft")
    model = _model()
    expected = _evaluate(model)
    settings = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])
    adapted = peft.get_peft_model(model, settings)
    found = _evaluate(adapted.get_base_model())
    assert [row.perplexity for row in found.rows] == pytest.approx(
        [row.perplexity for row in expected.rows], rel=1e-5
    ), "a fresh LoRA changes nothing"


def test_dropout_and_the_ambient_pathway_do_not_matter():
    model = _model(architecture="gpt2")
    expected = _evaluate(model)
    model.train()
    with model.pathway("law"):
        assert _evaluate(model) == expected


def test_plain_models_are_refused():
    with pytest.raises(PathwaysError, match="LlamaForCausalLM"):
        _evaluate(build("llama"))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"texts": {"cod": "x"}}, "code"),
        ({"texts": {"code": TEXTS["code"], "lwa": "x"}}, "law"),
        ({"seen": "included"}, "include"),
    ],
    ids=["domain", "second domain", "seen"],
)
def test_unknown_names_are_refused_with_a_hint(options, hint):
    with pytest.raises(UnknownNameError, match=rf"Did you mean '{hint}'\?"):
        _evaluate(_model(), **options)


@pytest.mark.parametrize("texts", [["the"], ["the", "of"]])
def test_text_without_a_second_token_is_refused(texts):
    with pytest.raises(TextError, match="two tokens"):
        _evaluate(_model(), {"code": texts})


@pytest.mark.parametrize("name", ["max_tokens", "max_length", "batch_size"])
def test_a_number_below_one_is_refused(name):
    model = _model()
    pathways = model.pathways
    with pytest.raises(PathwaysError, match=name):
        _evaluate(model, **{name: 0})
    assert model.pathways is pathways


def test_nan_weights_are_an_error_and_no_nan_in_a_report():
    model = _model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(PathwaysError, match=r"NaN|finite"):
        _evaluate(model)


def test_a_terrible_model_has_a_finite_perplexity():
    model = _model()
    model.lm_head.weight.data *= 1e6
    report = _evaluate(model)
    json.dumps(report.to_dict(), allow_nan=False)
    assert all(row.perplexity > 1e6 for row in report.rows if row.role == "dense")


def test_documents_are_taken_as_they_are():
    model = _model()
    read = read_documents(TEXTS["code"])
    assert _evaluate(model, {"code": read}) == _evaluate(model, {"code": TEXTS["code"]})
    assert all(isinstance(document, Document) for document in read.items)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_documents_of_one_token_do_not_spoil_the_intervals(case, count):
    dense, sparse = case[0], case[1]
    del dense
    texts = {"law": [*["alpha", "beta", "x", "y", "z"][:count], *documents("law", 2, 9, seed=8)]}
    report = sp.evaluate(sparse, TOKENIZER, texts)
    for row in report.rows:
        assert row.documents == 2
        assert all(math.isfinite(end) for end in row.interval)


def test_a_report_says_how_it_was_measured():
    model = _model(architecture="gpt2").to(torch.bfloat16)
    options = {"max_tokens": 40, "max_length": None, "batch_size": 3, "seed": 5}
    report = _evaluate(model, controls=False, seen="include", **options)
    settings = json.loads(json.dumps(report.to_dict(), allow_nan=False))["settings"]
    versions = settings.pop("versions")
    positions = model.config.max_position_embeddings
    assert settings == {
        **options,
        "max_length": positions,
        "seen": "include",
        "controls": False,
        "dtype": "bfloat16",
        "adapters": [],
    }
    assert positions < 512
    assert versions["hf-sparse-pathways"] == sp.version.__version__
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    line = str(report).splitlines()[-1]
    assert line.startswith("Settings: at most 40 tokens per domain")
    for part in (
        f"at most {positions},",
        "seed 5",
        "documents included",
        "no controls",
        "bfloat16",
    ):
        assert part in line


@pytest.mark.parametrize(("count", "said"), [(1, False), (2, True), (4, True), (5, False)])
def test_few_documents_are_said_to_be_few(case, count, said):
    _, model = case
    report = _evaluate(model, {"law": documents("law", count, 9, seed=8)}, controls=False)
    assert report.rows[0].documents == count
    assert ("few documents: the interval is a guess" in report.caption("law")) == said
