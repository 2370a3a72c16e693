"""Saved pathways are read back as they were, or refused; a failed save changes nothing."""

import builtins
import json
import os
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways import files
from hf_sparse_pathways.errors import ArtefactError, MismatchError, PathwaysError
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.pathways.storage import locate
from tests.architectures import random_masks, tiny_llama
from tests.pathways.corruption import (
    DEEP,
    FILES,
    WRONG,
    change_tensors,
    drop_field,
    flipped,
    read_meta,
    rewrite,
    set_field,
    taken,
)

MODEL = tiny_llama()
NAMES = ["pathways.json", "pathways.safetensors"]
REFUSED = (ArtefactError, MismatchError)


def _pathways(seed=0):
    masks = random_masks(MODEL, seed=seed)
    provenance = {"method": "tests", "text": {"source": "Käse", "digests": ["a"], "tokens": 5}}
    pathways = Pathways.from_masks(MODEL, masks)
    pooled = Pathway.from_keep(random_masks(MODEL, ["x"], seed=7)["x"], provenance)
    by_domain = {**pathways.by_domain, "médecine": Pathway.from_keep(masks["law"], provenance)}
    return replace(pathways, by_domain=by_domain).with_controls({"pooled": pooled})


@pytest.fixture
def path(tmp_path):
    _pathways().save_pretrained(tmp_path / "pathways")
    return tmp_path / "pathways" / "pathways.json"


def _content(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def _assert_same(left, right):
    assert left.base == right.base
    assert left.domains == right.domains
    assert list(left.controls) == list(right.controls)
    for name in (*left.domains, *left.controls):
        assert all(map(torch.equal, left[name].keep, right[name].keep))
        assert left[name].provenance == right[name].provenance


def _assert_refused(path):
    with pytest.raises(PathwaysError) as caught:
        Pathways.from_pretrained(path.parent)
    assert isinstance(caught.value, REFUSED), type(caught.value)


@pytest.mark.parametrize("convert", [str, lambda folder: folder], ids=["str", "Path"])
def test_saved_and_loaded_is_equal(path, convert):
    _assert_same(Pathways.from_pretrained(convert(path.parent)), _pathways())
    assert sorted(os.listdir(path.parent)) == NAMES


def test_saving_twice_gives_the_same_bytes(path, tmp_path):
    _pathways().save_pretrained(tmp_path / "again")
    Pathways.from_pretrained(path.parent).save_pretrained(tmp_path / "reread")
    assert _content(path.parent) == _content(tmp_path / "again") == _content(tmp_path / "reread")


def test_a_save_replaces_an_earlier_one_and_nothing_else(path):
    (path.parent / "notes.txt").write_text("mine")
    _pathways(seed=1).save_pretrained(path.parent)
    _assert_same(Pathways.from_pretrained(path.parent), _pathways(seed=1))
    assert (path.parent / "notes.txt").read_text() == "mine"


def test_pathways_without_domains_can_be_saved(tmp_path):
    empty = replace(_pathways(), by_domain={}, controls={})
    empty.save_pretrained(tmp_path)
    _assert_same(Pathways.from_pretrained(tmp_path), empty)


def test_a_subfolder_is_found(path):
    loaded = Pathways.from_pretrained(path.parents[1], subfolder="pathways")
    _assert_same(loaded, _pathways())


def test_the_description_is_readable(path):
    meta = read_meta(path)
    assert meta["base"]["model_type"] == "llama"
    assert [domain["name"] for domain in meta["domains"]] == ["code", "law", "médecine"]
    assert "médecine" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_refused(path, damage):
    FILES[damage](path)
    _assert_refused(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_of_two_saves_is_refused(path, tmp_path, name):
    _pathways(seed=1).save_pretrained(tmp_path / "other")
    (path.parent / name).write_bytes((tmp_path / "other" / name).read_bytes())
    _assert_refused(path)


def test_every_flipped_bit_of_the_tensors_is_noticed(path):
    tensors = path.with_suffix(".safetensors")
    whole = tensors.read_bytes()
    for position in range(0, len(whole), 5):
        tensors.write_bytes(flipped(whole, position, 1 << position % 8))
        _assert_refused(path)


@pytest.mark.parametrize("bits", [0x01, 0x20, 0x80])
def test_a_flipped_bit_of_the_description_is_read_or_refused(path, bits):
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        path.write_bytes(flipped(whole, position, bits))
        try:
            Pathways.from_pretrained(path.parent)
        except REFUSED:
            refused += 1
    assert refused > len(whole) / 4


def test_a_flipped_bit_under_the_right_sum_is_read_or_refused(path):
    whole = path.with_suffix(".safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(header):
        rewrite(path, data=flipped(whole, position, 1 << position % 7))
        try:
            Pathways.from_pretrained(path.parent)
        except REFUSED:
            refused += 1
    assert refused > header / 4


FIELDS = [
    ("base",),
    *(("base", name) for name in ("name", "revision", "model_type", "blocks", "routed")),
    *(("base", "blocks", 1, name) for name in ("name", "d_in", "d_ff", "d_out", "branches")),
    ("domains",),
    ("controls",),
    *(("domains", 0, name) for name in ("name", "provenance", "holds")),
    *(("controls", 0, name) for name in ("name", "provenance", "holds")),
]


@pytest.mark.parametrize("keys", FIELDS, ids=str)
def test_a_missing_field_is_refused(path, keys):
    drop_field(path, keys)
    _assert_refused(path)


def _may_be(keys, value):
    """Whether a value is a right one for a field."""
    name = keys[-1]
    if name in ("domains", "controls"):
        return value == []
    if name == "name":
        return value == "x"
    if name == 0:
        return value == "x" and keys[1] == "routed"
    return {
        "revision": value is None or isinstance(value, str),
        "routed": value in ([], ["x"]),
        "provenance": isinstance(value, dict),
        "d_in": type(value) is int and value > 0,
        "d_out": type(value) is int and value > 0,
        "branches": type(value) is int and value > 0,
        "model_type": isinstance(value, str),
    }.get(name, False)


@pytest.mark.parametrize(
    "keys", [*FIELDS, ("domains", 0), ("base", "blocks", 1), ("base", "routed", 0)], ids=str
)
def test_values_of_the_wrong_kind_are_refused(path, keys):
    if keys == ("base", "routed", 0):
        set_field(path, ["base", "routed"], ["a module"])
    wrong = [value for value in WRONG if not _may_be(keys, value)]
    assert taken(path, keys, wrong, Pathways, REFUSED) == []


OUT_OF_RANGE = {
    **{
        f"{name} {value}": (("base", "blocks", 1, name), value)
        for name in ("d_in", "d_ff", "d_out", "branches")
        for value in (0, -(2**70), 2**31, 2**70, 10**400, 48.0)
    },
    "wide": (("base", "blocks", 1, "d_ff"), 2**31 - 1),
    "narrow": (("base", "blocks", 1, "d_ff"), 47),
    "unknown field of a block": (("base", "blocks", 1, "extra"), 1),
    "unknown field of the base": (("base", "extra"), 1),
    "holds more": (("domains", 1, "holds"), ["keep", "bias"]),
    "holds what is unknown": (("domains", 1, "holds"), ["keep", "routing"]),
    "holds a part twice": (("domains", 1, "holds"), ["keep", "keep"]),
    "holds no list": (("domains", 1, "holds"), "keep"),
    "holds numbers": (("domains", 1, "holds"), ["keep", 3]),
    "domain twice": (("domains", 1, "name"), "code"),
    "another domain": (("domains", 3), {"name": "x", "provenance": {}, "holds": ["keep"]}),
    **{
        f"domain {name!r}": (("domains", 0, "name"), name)
        for name in ("", "../x", "pooled", "a\nb", "\x1b[2J", "x" * 65)
    },
}


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(path, kind):
    keys, value = OUT_OF_RANGE[kind]
    if keys == ("domains", 3):
        keys, value = ("domains",), [*read_meta(path)["domains"], value]
    set_field(path, keys, value)
    _assert_refused(path)


@pytest.mark.parametrize("group", [("base", "blocks"), ("domains",), ("controls",)], ids=str)
def test_tensors_that_nothing_describes_are_refused(path, group):
    meta = place = read_meta(path)
    for key in group:
        place = place[key]
    place.pop()
    rewrite(path, meta)
    with pytest.raises(ArtefactError, match="belongs to no domain"):
        Pathways.from_pretrained(path.parent)


def test_deep_nesting_inside_a_provenance_is_refused(path):
    text = path.read_text().replace('"tests"', DEEP, 1)
    path.write_text(text)
    _assert_refused(path)


TENSOR_CHANGES = {
    "missing": lambda t: {k: v for k, v in t.items() if k != "1.2.keep"},
    "missing control": lambda t: {k: v for k, v in t.items() if not k.startswith("c")},
    "renamed": lambda t: {f"x{k}": v for k, v in t.items()},
    "uint8": lambda t: {**t, "0.1.keep": t["0.1.keep"].to(torch.uint8)},
    "float": lambda t: {k: v.float() for k, v in t.items()},
    "shorter": lambda t: {**t, "0.1.keep": t["0.1.keep"][:-1].clone()},
    "longer": lambda t: {**t, "c0.1.keep": torch.ones(49, dtype=torch.bool)},
    "two dimensions": lambda t: {**t, "0.1.keep": t["0.1.keep"][None]},
    "scalar": lambda t: {**t, "0.1.keep": torch.tensor(True)},
    "empty": lambda t: {**t, "0.1.keep": torch.ones(0, dtype=torch.bool)},
    "nothing kept": lambda t: {**t, "2.0.keep": torch.zeros(48, dtype=torch.bool)},
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_wrong_tensors_are_refused(path, change):
    change_tensors(path, TENSOR_CHANGES[change])
    _assert_refused(path)


def test_a_newer_format_says_to_upgrade(path):
    set_field(path, ["format"], 2)
    with pytest.raises(ArtefactError, match=r"format 2.*Upgrade hf-sparse-pathways"):
        Pathways.from_pretrained(path.parent)


@pytest.mark.parametrize(
    "source", ["not a repository !", "a/b/c/d", "", "x" * 300, "../absent", "folder/absent"]
)
def test_a_place_without_pathways_is_refused_by_name(monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtefactError):
        Pathways.from_pretrained(source)


def test_a_folder_without_pathways_says_how_they_come_there(tmp_path):
    with pytest.raises(ArtefactError, match="save_pretrained"):
        locate(tmp_path, "pathways.json")


def test_a_full_checkpoint_refuses_damaged_pathways(tmp_path):
    model = sp.SparsePathwaysForCausalLM.from_dense(MODEL, _pathways())
    model.save_pretrained(tmp_path)
    _assert_same(Pathways.from_pretrained(tmp_path), _pathways())
    path = tmp_path / "pathways.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError):
        sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path)


UNSAVABLE = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a path": os.curdir.encode(),
    "an object": object(),
    "half a surrogate pair": "\ud83d",
}


@pytest.mark.parametrize("kind", UNSAVABLE)
def test_a_provenance_that_cannot_be_saved_leaves_the_old_files(path, kind):
    before = _content(path.parent)
    first = replace(_pathways()["code"], provenance={"value": UNSAVABLE[kind]})
    bad = replace(_pathways(seed=1), by_domain={"code": first})
    try:
        bad.save_pretrained(path.parent)
    except (ValueError, TypeError):
        assert _content(path.parent) == before
    else:
        loaded = Pathways.from_pretrained(path.parent)
        assert loaded["code"].provenance == first.provenance


class Failing:
    """Call a function, but fail at the n-th call."""

    def __init__(self, function, call):
        self.function, self.left = function, call

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        return self.function(*args, **kwargs)


# Every point before the first file is renamed to its place.
POINTS = [
    *((name, call) for name in ("fdopen", "chmod") for call in (1, 2)),
    ("mkstemp", 1),
    ("mkstemp", 2),
    ("replace", 1),
]


@pytest.mark.parametrize(("name", "call"), POINTS)
def test_a_failed_save_leaves_the_old_files_and_nothing_else(path, monkeypatch, name, call):
    before = _content(path.parent)
    place = files.tempfile if name == "mkstemp" else files.os
    with monkeypatch.context() as patch:
        patch.setattr(place, name, Failing(getattr(place, name), call))
        with pytest.raises(OSError, match="No space"):
            _pathways(seed=1).save_pretrained(path.parent)
    assert sorted(os.listdir(path.parent)) == NAMES, "no temporary file"
    assert _content(path.parent) == before
    _assert_same(Pathways.from_pretrained(path.parent), _pathways())


def test_a_save_that_fails_between_two_renames_is_noticed(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", Failing(os.replace, 2))
        with pytest.raises(OSError, match="No space"):
            _pathways(seed=1).save_pretrained(path.parent)
    assert sorted(os.listdir(path.parent)) == NAMES, "no temporary file"
    try:
        loaded = Pathways.from_pretrained(path.parent)
    except ArtefactError as error:
        assert "SHA-256" in str(error)  # noqa: PT017
    else:
        _assert_same(loaded, _pathways())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_save_leaves_no_temporary_file(path, monkeypatch, interrupt):
    before = _content(path.parent)

    def stop(*_):
        raise interrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", stop)
        with pytest.raises(interrupt):
            _pathways(seed=1).save_pretrained(path.parent)
    assert _content(path.parent) == before


def test_loading_reads_no_pickle(path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    _assert_same(Pathways.from_pretrained(path.parent), _pathways())
    json.loads(path.read_text())
