"""The choices of ``select`` and their defaults."""

import json

import pytest

from hf_sparse_pathways.discovery.recipe import make_recipe, parse_compensation, resolve_method
from hf_sparse_pathways.discovery.repair import NO_REPAIR, Repair
from hf_sparse_pathways.discovery.scores import SCORES
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError

COMPENSATIONS = {
    "none": NO_REPAIR,
    "bias": Repair(refit=False),
    "refit": Repair(bias=False),
    "refit+bias": Repair(),
    " bias + refit ": Repair(),
    "bypass:4": Repair(refit=False, bias=False, bypass_rank=4),
    "patch:2": Repair(bias=False, patch_rank=2),
    "patch:2+refit+bias+bypass:16": Repair(bypass_rank=16, patch_rank=2),
}


@pytest.mark.parametrize("text", COMPENSATIONS)
def test_a_compensation_is_read(text):
    assert parse_compensation(text) == COMPENSATIONS[text]
    assert parse_compensation(text, 0.5).ridge == 0.5


@pytest.mark.parametrize(
    "text",
    ["", "refits", "bypass", "bypass:", "bypass:0", "bypass:-1", "bypass:x", "patch:1.5", "refit+",
     "refit,bias", "none+bias", "none+bypass:3"],
)  # fmt: skip
def test_any_other_compensation_is_refused(text):
    with pytest.raises(PathwaysError, match="compensation"):
        parse_compensation(text)


@pytest.mark.parametrize("text", ["bypass:2+bypass:4", "patch:2+patch:2"])
def test_a_rank_that_is_given_twice_is_refused(text):
    with pytest.raises(PathwaysError, match="compensation"):
        parse_compensation(text)


@pytest.mark.parametrize("text", [5, ["refit"]], ids=repr)
def test_a_compensation_that_is_no_text_is_refused(text):
    with pytest.raises(PathwaysError, match="compensation"):
        parse_compensation(text)


@pytest.mark.parametrize("ridge", [0, -1, float("nan"), float("inf")])
def test_a_ridge_out_of_range_is_refused(ridge):
    with pytest.raises(PathwaysError, match="ridge"):
        parse_compensation("refit", ridge)


DEFAULTS = {
    "obs": ("auto", "refit+bias", "auto"),
    "flap": ("uniform", "bias", "one-shot"),
    "wanda": ("uniform", "none", "one-shot"),
    "taylor": ("uniform", "none", "one-shot"),
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_method_has_its_defaults(method):
    recipe = make_recipe(method)
    assert (recipe.allocation, recipe.compensation, recipe.order) == DEFAULTS[method]
    assert recipe.score is SCORES.get(method)


def test_what_is_given_comes_before_the_defaults():
    given = {
        "allocation": "depth",
        "compensation": "bypass:3",
        "ridge": 0.1,
        "order": "sequential",
        "multiple": 8,
        "precision": "bfloat16",
        "seed": 7,
    }
    assert make_recipe("wanda", **given).described() == {"method": "wanda", **given}


@pytest.mark.parametrize("ridge", ["automatic", "", 0, -0.1])
def test_a_ridge_that_does_not_fit_is_refused(ridge):
    with pytest.raises(PathwaysError, match="ridge"):
        make_recipe("obs", ridge=ridge)


def test_functions_are_described_by_name():
    def mine(block):
        return block.statistics.mean

    recipe = make_recipe(mine, allocation=lambda blocks, _: [1] * len(blocks))
    assert resolve_method(mine) == ("mine", mine)
    described = json.loads(json.dumps(recipe.described()))
    assert (described["method"], described["allocation"]) == ("mine", "a user's function")


@pytest.mark.parametrize("method", ["ob", 5, None, ""])
def test_an_unknown_method_is_refused_with_those_that_exist(method):
    with pytest.raises(UnknownNameError, match="'obs', 'mean_abs'"):
        make_recipe(method)
