"""Whatever happens to a saved profile, reading it is right or an ``ArtefactError``."""

import pytest
import torch

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.statistics import TENSORS
from hf_sparse_pathways.errors import ArtefactError
from tests.architectures import tiny_llama
from tests.discovery.profiles import random_profile
from tests.pathways.corruption import (
    FILES,
    WRONG,
    change_tensors,
    drop_field,
    flipped,
    read_meta,
    set_field,
    taken,
)


@pytest.fixture
def path(tmp_path):
    random_profile(tiny_llama()).save_pretrained(tmp_path / "profile")
    return tmp_path / "profile" / "profile.json"


def _assert_refused(path):
    with pytest.raises(ArtefactError):
        Profile.from_pretrained(path.parent)


@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_refused(path, damage):
    FILES[damage](path)
    _assert_refused(path)


def test_a_pair_of_two_saves_is_refused(path, tmp_path):
    random_profile(tiny_llama(), seed=1).save_pretrained(tmp_path / "other")
    other = (tmp_path / "other" / "profile.safetensors").read_bytes()
    path.with_suffix(".safetensors").write_bytes(other)
    _assert_refused(path)


@pytest.mark.parametrize(
    "keys",
    [
        ("base",),
        ("base", "blocks"),
        ("base", "blocks", 1, "d_ff"),
        ("domains",),
        ("domains", 0, "name"),
        ("domains", 0, "tokens"),
        ("domains", 1, "provenance"),
    ],
    ids=str,
)
def test_a_missing_field_is_refused(path, keys):
    drop_field(path, keys)
    _assert_refused(path)


WRONG_VALUES = {
    ("base",): WRONG,
    ("domains",): [value for value in WRONG if value != []],
    ("domains", 0): WRONG,
    ("domains", 0, "name"): (None, True, 5, [], {}),
    ("domains", 0, "tokens"): (*WRONG, "999", [9.5] * 3, ["9"] * 3, [9] * 4),
    ("domains", 0, "tokens", 1): (None, True, 0, -1, 1.5, "5", [], {}),
    ("domains", 0, "provenance"): WRONG[:8],
}


@pytest.mark.parametrize("keys", WRONG_VALUES, ids=str)
def test_values_of_the_wrong_kind_are_refused(path, keys):
    assert taken(path, keys, WRONG_VALUES[keys], Profile, ArtefactError) == []


def test_a_domain_that_stands_twice_is_refused(path):
    set_field(path, ("domains", 0, "name"), "law")
    _assert_refused(path)


TENSOR_CHANGES = {
    "missing": lambda tensors: {k: v for k, v in tensors.items() if k != "0.1.sum"},
    "renamed": lambda tensors: {f"x{k}": v for k, v in tensors.items()},
    "float32": lambda tensors: {k: v.float() for k, v in tensors.items()},
    "integer": lambda tensors: {k: v.long() for k, v in tensors.items()},
    "shorter": lambda tensors: {**tensors, "0.0.sum": tensors["0.0.sum"][:-1].clone()},
    "longer": lambda tensors: {**tensors, "0.0.sum": torch.zeros(1000).double()},
    "two dimensions": lambda tensors: {k: v[None] for k, v in tensors.items()},
    **{
        f"{value} in {name}": lambda tensors, name=name, value=value: {
            **tensors,
            f"1.2.{name}": torch.full_like(tensors[f"1.2.{name}"], value),
        }
        for name in TENSORS
        for value in (float("nan"), float("inf"), -float("inf"))
    },
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_wrong_tensors_are_refused(path, change):
    change_tensors(path, TENSOR_CHANGES[change])
    _assert_refused(path)


def test_one_nan_among_many_numbers_is_found(path):
    def change(tensors):
        tensors["0.0.sum"][7] = float("nan")
        return tensors

    change_tensors(path, change)
    with pytest.raises(ArtefactError, match=r"layers\.0.*sum holds 1 value"):
        Profile.from_pretrained(path.parent)


def test_large_finite_sums_are_no_infinity(path):
    def change(tensors):
        tensors["0.0.square_sum"][:] = 1e308
        return tensors

    change_tensors(path, change)
    assert Profile.from_pretrained(path.parent)["code"].blocks[0].square_sum.sum().isinf()


def test_a_flipped_bit_of_the_description_is_read_or_refused(path):
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 2):
        for bits in (0x01, 0x20, 0x80):
            path.write_bytes(flipped(whole, position, bits))
            try:
                Profile.from_pretrained(path.parent)
            except ArtefactError:
                refused += 1
    assert refused > len(whole) / 2


def test_the_error_of_a_newer_format_says_to_upgrade(path):
    set_field(path, ["format"], read_meta(path)["format"] + 1)
    with pytest.raises(ArtefactError, match="Upgrade hf-sparse-pathways"):
        Profile.from_pretrained(path.parent)
