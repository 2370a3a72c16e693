"""Whatever happens to a saved profile, reading it is right or an ``ArtefactError``."""

import hashlib
import os
import re

import pytest
import torch
from safetensors.torch import load, save

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.selection import select
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
from tests.pathways.hostile import JSON
from tests.texts import documents, tiny_tokenizer


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


HOSTILE = [
    name for name in JSON if not name.startswith(("domain", "control", "a control", "holds"))
]
HOSTILE = [name for name in HOSTILE if not name.startswith(("many apart", "text", "healing"))]


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_description_is_refused(path, damage):
    JSON[damage](path)
    _assert_refused(path)


@pytest.mark.parametrize(
    "text", [{"digests": 5}, {"digests": [5]}, {"tokens": "x"}, {"tokens": True}, {"source": []}]
)
def test_a_hostile_provenance_is_refused(path, text):
    set_field(path, ("domains", 0, "provenance"), text)
    _assert_refused(path)


def test_profiles_that_do_not_say_their_source_can_be_merged(path):
    for index in (0, 1):
        set_field(path, ("domains", index, "provenance"), {})
    pooled = Profile.from_pretrained(path.parent).pooled()
    assert pooled.provenance["tokens"] == 0


WINDOWS = {
    "longer than the ids": {"lengths": [2, 2]},
    "shorter than the ids": {"lengths": [1]},
    "negative": {"lengths": [4, -1]},
    "empty": {"lengths": [3, 0]},
    "negative ids": {"ids": [1, 2, -3]},
    "long integers": {"ids": torch.tensor([1, 2, 3])},
    "a matrix": {"ids": torch.ones(3, 1, dtype=torch.int32)},
    "a scalar": {"ids": torch.tensor(3, dtype=torch.int32)},
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_that_are_none_are_refused(path, kind):
    parts = {"ids": [1, 2, 3], "lengths": [3], **WINDOWS[kind]}
    parts = {name: torch.as_tensor(value) for name, value in parts.items()}
    if "long" not in kind:
        parts = {name: tensor.int() for name, tensor in parts.items()}

    def change(tensors):
        return {**tensors, **{f"0.windows.{name}": value for name, value in parts.items()}}

    change_tensors(path, change)
    _assert_refused(path)


def test_tensors_that_nothing_describes_are_refused(path):
    change_tensors(path, lambda tensors: {**tensors, "9.0.sum": torch.zeros(3).double()})
    _assert_refused(path)


def test_a_save_deletes_nothing_behind_a_link(path, tmp_path):
    other = tmp_path / "models"
    other.mkdir()
    named = f"{'a' * 24}.safetensors"
    for name in ("model.safetensors", named):
        (other / name).write_text("mine")
    (path.parent / "grams").symlink_to(other)
    random_profile(tiny_llama()).save_pretrained(path.parent)
    assert len(os.listdir(other)) == 2
    (path.parent / "grams").unlink()
    other.rename(path.parent / "grams")
    random_profile(tiny_llama()).save_pretrained(path.parent)
    assert os.listdir(path.parent / "grams") == ["model.safetensors"], "which is nothing of ours"


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


@pytest.fixture(scope="module")
def with_grams():
    """Two profiles with Gram matrices of one model."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    return [
        profile(model, tokenizer, {"code": documents("code", 9, 20, seed)}, max_tokens=100)
        for seed in (0, 1)
    ]


def _totals(given, domain="code"):
    return [source.load().total for source in given[domain].grams]


def _assert_equal_grams(mine, theirs):
    assert len(mine) == len(theirs) == 3
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_grams_and_windows_are_saved_and_loaded(with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    loaded = Profile.from_pretrained(tmp_path)
    _assert_equal_grams(_totals(loaded), _totals(with_grams[0]))
    for split in ("windows", "validation"):
        mine, theirs = getattr(loaded["code"], split), getattr(with_grams[0]["code"], split)
        assert theirs
        assert [window.ids for window in mine] == [window.ids for window in theirs]


def test_grams_are_not_read_before_they_are_used(with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    loaded = Profile.from_pretrained(tmp_path)
    for file in os.scandir(tmp_path / "grams"):
        os.truncate(file, 100)
    with pytest.raises(ArtefactError, match="truncated or corrupt"):
        loaded["code"].grams[0].load()


def _gram_of_block(folder, index):
    name = read_meta(folder / "profile.json")["domains"][0]["grams"][index]["file"]
    return folder / "grams" / name


def _with_tensor(change):
    """Replace a file's matrix, and the SHA-256 in the description with it."""

    def damage(path):
        data = save(change(load(path.read_bytes())))
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        set_field(path.parents[1] / "profile.json", ["domains", 0, "grams", 1, "sha256"], digest)

    return damage


def _nan(tensors):
    tensors["total"][3, 5] = float("nan")
    return tensors


DAMAGED_GRAMS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, 10_000),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes(), 9000, 1)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "NaN": _with_tensor(_nan),
    "float64": _with_tensor(lambda tensors: {"total": tensors["total"].double()}),
    "smaller": _with_tensor(lambda tensors: {"total": tensors["total"][:-1, :-1].contiguous()}),
    "renamed": _with_tensor(lambda tensors: {"sum": tensors["total"]}),
}


@pytest.mark.parametrize("damage", DAMAGED_GRAMS)
def test_a_damaged_gram_file_is_refused_by_name(damage, with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    path = _gram_of_block(tmp_path, 1)
    DAMAGED_GRAMS[damage](path)
    with pytest.raises(ArtefactError, match=re.escape(path.name)):
        Profile.from_pretrained(tmp_path)["code"].grams[1].load()


WRONG_GRAMS = {
    ("domains", 0, "grams"): [value for value in WRONG if value != []],
    ("domains", 0, "grams", 1): WRONG,
    ("domains", 0, "grams", 1, "file"): (*WRONG, "../../etc/passwd", "", "\0", "\x1b[2J", "."),
}


@pytest.mark.parametrize("keys", WRONG_GRAMS, ids=str)
def test_gram_entries_of_the_wrong_kind_are_refused(keys, with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    path = tmp_path / "profile.json"
    assert taken(path, keys, WRONG_GRAMS[keys], Profile, ArtefactError) == []


def test_a_merged_profile_can_be_saved_over_one_of_its_parts(with_grams, tmp_path):
    for name, part in zip("ab", with_grams, strict=True):
        part.save_pretrained(tmp_path / name)
    first, second = (Profile.from_pretrained(tmp_path / name) for name in "ab")
    first.merged(second).save_pretrained(tmp_path / "a")
    expected = [sum(parts) for parts in zip(*map(_totals, with_grams), strict=True)]
    _assert_equal_grams(_totals(Profile.from_pretrained(tmp_path / "a")), expected)
    assert len(os.listdir(tmp_path / "a" / "grams")) == 6, "the merged profile still reads the old"
    Profile.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "a")
    assert len(os.listdir(tmp_path / "a" / "grams")) == 3
    _assert_equal_grams(_totals(Profile.from_pretrained(tmp_path / "b")), _totals(with_grams[1]))


def test_a_merged_profile_is_still_good_after_it_was_saved_over_its_part(with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    merged = Profile.from_pretrained(tmp_path).merged(with_grams[1])
    merged.save_pretrained(tmp_path)
    select(tiny_llama(), merged, order="one-shot", allocation="uniform")


def test_saving_again_over_itself_changes_nothing(with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    Profile.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_gram_files_of_an_overwritten_profile_are_deleted(with_grams, tmp_path):
    with_grams[0].save_pretrained(tmp_path)
    random_profile(tiny_llama()).save_pretrained(tmp_path)
    assert not os.listdir(tmp_path / "grams")
    assert Profile.from_pretrained(tmp_path)["law"].grams == ()
