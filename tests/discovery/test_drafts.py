"""However neurons are chosen, a pathway computes no more than was asked for."""

import numpy
import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import obs, planning
from hf_sparse_pathways.discovery.evidence import gather_evidence
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.recipe import make_recipe
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import count_tokens
from hf_sparse_pathways.errors import PathwaysError
from tests.architectures import ARCHITECTURES, build, prompt, tiny_llama
from tests.texts import documents, tiny_tokenizer

TEXTS = {name: documents(name, 10, 16) for name in ("code", "law")}
COMPENSATIONS = ["none", "bias", "refit", "bypass:4", "refit+bias+bypass:4", "patch:2+bias"]
PROFILED = sorted(set(ARCHITECTURES) - {"cpmant"})  # its prompt tokens are in no batch
IDS = prompt()


def _take(model, texts=TEXTS, **options):
    options = {"max_length": 32, "max_tokens": 120, **options}
    return profile(model, tiny_tokenizer(), texts, **options)


@pytest.fixture(autouse=True)
def _in_few_steps(monkeypatch):
    monkeypatch.setattr(obs, "STEPS", 6)  # these models' time goes into them


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(), _take(tiny_llama())


@pytest.fixture(scope="module", params=["gpt2_odd", "gemma3"])
def case(request):
    model = build(request.param)
    return model, _take(model)


def _assert_within(pathways, sparsity):
    for name in (*pathways.by_domain, *pathways.controls):
        assert pathways.flops(name) <= 1 - sparsity + 1e-9
        assert pathways.flops(name) >= 0.9 * (1 - sparsity) - 0.05


@pytest.mark.parametrize("architecture", PROFILED)
def test_every_architecture_keeps_the_budget(architecture):
    model = build(architecture)
    taken = _take(model, texts={"code": TEXTS["code"]}, max_tokens=64)
    options = {"compensation": "refit+bias+bypass:4", "allocation": "water_filling"}
    pathways = select(model, taken, sparsity=0.5, **options)
    _assert_within(pathways, 0.5)
    assert pathways["code"].provenance["order"] == "sequential"


@pytest.mark.parametrize(
    ("method", "order"), [("obs", "sequential"), ("obs", "one-shot"), ("taylor", "sequential")]
)
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_every_choice_keeps_the_budget(case, method, compensation, order):
    model, taken = case
    options = {"method": method, "compensation": compensation, "order": order, "sparsity": 0.45}
    pathways = select(model, taken.subset(["code"]), **options)
    _assert_within(pathways, 0.45)
    for block in pathways["code"].blocks:
        assert (block.delta is not None) == ("refit" in compensation or "patch" in compensation)
        assert (block.bias is not None) == ("bias" in compensation)
        assert (block.bypass is not None) == ("bypass" in compensation)
    assert pathways["code"].provenance["order"] == order
    assert pathways["code"].provenance["compensation"] == compensation


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("allocation", ["auto", "water_filling", "uniform", "depth"])
def test_every_allocation_keeps_the_budget(llama, allocation, sparsity):
    pathways = select(*llama, sparsity=sparsity, allocation=allocation, order="one-shot")
    for name in ("code", "law", "pooled"):
        assert pathways.flops(name) <= 1 - sparsity + 1e-9


@pytest.mark.parametrize("rank", [24, 32, 200])
def test_a_bypass_that_leaves_no_room_for_neurons_is_refused(llama, rank):
    with pytest.raises(PathwaysError, match="bypass"):
        select(*llama, sparsity=0.8, compensation=f"bypass:{rank}", allocation="uniform")


@pytest.mark.parametrize("compensation", ["none", "refit+bias", "bypass:4", "patch:2+bias"])
@pytest.mark.parametrize("method", ["obs", "wanda"])
@pytest.mark.parametrize("sparsity", [0.0, [0.0, 0.0, 0.0]], ids=str)
@torch.no_grad()
def test_nothing_removed_is_bit_equal_to_dense(llama, sparsity, method, compensation):
    model, taken = llama
    pathways = select(model, taken, sparsity=sparsity, method=method, compensation=compensation)
    for name in ("code", "law", "pooled"):
        assert not any(block.compensated for block in pathways[name].blocks)
        assert pathways.flops(name) == 1
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, pathways)
    for executor in ("masked", "compact"):
        sparse.set_executor(executor)
        assert torch.equal(sparse(IDS, domain="law").logits, model(IDS).logits)


def test_a_percentile_that_removes_nothing_holds_no_compensation(llama):
    pathways = select(*llama, percentile=0, method="obs")
    assert not any(block.compensated for block in pathways["code"].blocks)


def test_blocks_keep_their_own_sparsities_with_every_compensation(llama):
    fractions = [0.25, 0.5, 0.75]
    plain = select(*llama, sparsity=fractions, order="one-shot")
    assert [block.kept for block in plain["code"].blocks] == [36, 24, 12]
    pathways = select(*llama, sparsity=fractions, order="one-shot", compensation="refit+bypass:3")
    for block, fraction in zip(pathways["code"].blocks, fractions, strict=True):
        assert block.kept == int(48 * (1 - fraction) - 3 * 64 / 96)


@pytest.mark.parametrize("multiple", [4, 8, 16])
@pytest.mark.parametrize("allocation", ["uniform", "water_filling"])
def test_widths_are_multiples(llama, allocation, multiple):
    options = {"multiple": multiple, "order": "one-shot", "compensation": "refit+bypass:2"}
    pathways = select(*llama, sparsity=0.4, allocation=allocation, **options)
    for name in ("code", "pooled"):
        assert all(block.kept % multiple == 0 for block in pathways[name].blocks)
        assert pathways.flops(name) <= 0.6 + 1e-9


def test_a_users_allocation_is_given_the_blocks_and_the_budget(llama):
    given = []

    def narrow(blocks, budget):
        given.append((blocks, budget))
        return [10, 20, 30]

    pathways = select(*llama, sparsity=0.5, allocation=narrow, compensation="bypass:3")
    assert [block.kept for block in pathways["law"].blocks] == [10, 20, 30]
    assert pathways["law"].provenance["allocation"] == "narrow"
    blocks, budget = given[0]
    assert (budget.kept, budget.multiple) == (0.5, 1)
    assert budget.overhead == (3 * 64 / 96,) * 3
    for block in blocks:
        assert (block.d_ff, block.flops_per_neuron) == (48, 96)
        assert block.error.shape == (49,)
        assert (block.error.diff() >= 0).all()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"multiple": 32, "sparsity": 0.5}, "66.7%"),
        ({"multiple": 32, "sparsity": 0.5, "method": "wanda"}, "66.7%"),
        ({"multiple": 32, "sparsity": [0.5, 0.1, 0.0]}, "66.7%"),
        ({"multiple": 49}, "49"),
        ({"sparsity": 0.5, "allocation": lambda blocks, _: [b.d_ff for b in blocks]}, "100.0%"),
        ({"multiple": 8, "sparsity": 0.5, "allocation": lambda *_: [13] * 3}, "multiple of 8"),
    ],
)
def test_what_is_above_the_budget_is_refused(llama, options, part):
    with pytest.raises(PathwaysError, match=part):
        select(*llama, order="one-shot", **options)


@pytest.mark.parametrize("sparsity", [0.0, [0.0] * 3], ids=str)
@pytest.mark.parametrize("options", [{}, {"compensation": "bypass:200"}])
def test_nothing_removed_is_everything_kept_whatever_the_multiple(llama, sparsity, options):
    pathways = select(*llama, sparsity=sparsity, multiple=32, order="one-shot", **options)
    assert pathways.flops("code") == pathways.flops("pooled") == 1.0


@pytest.mark.parametrize("widths", [[10, 20], [10, 20, 49], [0, 1, 1], None, "abc"], ids=repr)
def test_a_users_allocation_that_returns_nonsense_is_refused(llama, widths):
    with pytest.raises(PathwaysError, match="one width per FFN block"):
        select(*llama, allocation=lambda *_: widths, order="one-shot")


def test_auto_takes_what_has_the_least_loss_and_says_which(llama):
    model, taken = llama
    assert taken["code"].validation
    pathways = select(model, taken, sparsity=0.5, order="one-shot")
    chosen = pathways["code"].provenance["allocation"]
    again = select(model, taken, sparsity=0.5, order="one-shot", allocation=chosen)
    evidence = gather_evidence(model, taken, {}, make_recipe("obs"))["code"]
    trial = planning._Plan(evidence).trial
    losses = {}
    for name in planning.AUTO:
        options = {"sparsity": 0.5, "order": "one-shot", "ridge": 0.01, "allocation": name}
        made = select(model, taken, controls=False, **options)["code"].blocks
        losses[name] = mean_loss(model, trial, made, evidence.blocks)
    assert losses[chosen] == min(losses.values()) < max(losses.values())
    for mine, theirs in zip(pathways["code"].keep, again["code"].keep, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("calibrated", "trial"), [(120, 40), (320, 80), (1280, 160)])
def test_a_trial_grows_with_the_text_up_to_a_limit(monkeypatch, calibrated, trial):
    monkeypatch.setattr(planning, "TRIAL_TOKENS", (40, 160))
    model = tiny_llama()
    texts = {"code": documents("code", 99, 60)}
    taken = _take(model, texts, max_tokens=calibrated, validation_tokens=600)
    evidence = gather_evidence(model, taken, {}, make_recipe("obs"))["code"]
    tokens = count_tokens(planning._Plan(evidence).trial)
    assert trial <= tokens < 1.7 * trial  # whole windows, from all over the text


@pytest.mark.parametrize("compensation", ["refit+bias", "refit+bias+bypass:2"])
@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_a_ridge_that_is_given_is_the_one_that_was_chosen(llama, order, compensation):
    """The ranking does not depend on the repair's ridge, which is chosen after it."""
    options = {"sparsity": 0.5, "order": order, "allocation": "uniform"}
    options["compensation"] = compensation
    chosen = select(*llama, **options)["code"]
    given = select(*llama, **options, ridge=chosen.provenance["ridge"])["code"]
    for mine, theirs in zip(chosen.blocks, given.blocks, strict=True):
        assert torch.equal(mine.keep, theirs.keep)
        assert torch.equal(mine.full_delta, theirs.full_delta)
    other = select(*llama, **options, ridge=5.0)["code"].blocks[0]
    if "bypass" not in compensation:  # which the ranking knows of
        assert torch.equal(chosen.blocks[0].keep, other.keep)
    assert not torch.equal(chosen.blocks[0].full_delta, other.full_delta)


@pytest.mark.parametrize(
    "options",
    [
        {"percentile": 50.0, "multiple": 4},
        {"percentile": 50.0, "allocation": "uniform"},
        {"sparsity": [0.1, 0.2, 0.3], "allocation": "uniform"},
        {"sparsity": torch.tensor([0.1, 0.2, 0.3]), "allocation": "auto"},
        {"sparsity": {"code": [0.1, 0.2, 0.3], "law": 0.3}, "allocation": "auto"},
    ],
    ids=repr,
)
def test_an_option_that_another_makes_void_is_refused(llama, options):
    with pytest.raises(PathwaysError, match="leave out"):
        select(*llama, **options)


@pytest.mark.parametrize("number", [numpy.float32(0.25), torch.tensor(0.25), numpy.array(0.25)])
def test_one_sparsity_is_one_in_any_form(llama, number):
    chosen = select(*llama, sparsity=number, order="one-shot")["code"]
    expected = select(*llama, sparsity=0.25, order="one-shot")["code"]
    assert chosen.provenance["allocation"] == expected.provenance["allocation"] != "given"
    for mine, theirs in zip(chosen.keep, expected.keep, strict=True):
        assert torch.equal(mine, theirs)


def test_without_validation_text_auto_is_balanced():
    taken = _take(tiny_llama(), validation_tokens=0)
    pathways = select(tiny_llama(), taken, sparsity=0.5, order="one-shot")
    assert pathways["code"].provenance["allocation"] == "balanced"


def test_rankings_and_repairs_are_not_rounded_with_the_passes(monkeypatch):
    """Autocast would run the products between the passes in bfloat16 too."""
    seen = []
    own = torch.linalg.cholesky

    def spy(matrix):
        seen.append((matrix.float() @ matrix.float().T).dtype)
        return own(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", spy)
    model = build("llama")
    texts = {"law": documents("law", 12, 20)}
    taken = profile(model, tiny_tokenizer(), texts, max_length=64)
    select(model, taken, sparsity=0.5, precision="bfloat16")
    assert set(seen) == {torch.float32}
