"""Domains in folders of their own are read as if they lay together, and never from elsewhere."""

import json
import shutil

import pytest
import torch

from hf_sparse_pathways.errors import ArtefactError, MismatchError, PathwaysError, UnknownNameError
from hf_sparse_pathways.pathways.apart import folder_for, list_apart
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.storage import pathway_files, write_pathways
from tests.architectures import random_masks, tiny_llama
from tests.pathways.corruption import FILES, set_field

MODEL = tiny_llama()
NAMES = ("code", "médecine", "C++ 17", "LAW", "law")


def _pathways(names=NAMES):
    paths = Pathways.from_masks(MODEL, random_masks(MODEL, names))
    return paths.with_controls({"pooled": paths[names[0]]})


@pytest.fixture
def folder(tmp_path):
    write_pathways(_pathways(), tmp_path / "x", apart=True)
    return tmp_path / "x"


def _listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_they_are_read_in_order(folder):
    found, expected = Pathways.from_pretrained(folder), _pathways()
    assert found.domains == list(NAMES)
    assert list(found.controls) == ["pooled"]
    for name in (*NAMES, "pooled"):
        assert all(map(torch.equal, found[name].keep, expected[name].keep))
    assert len(pathway_files(folder)) == 2 * (len(NAMES) + 1)
    assert all(path.is_file() for path in pathway_files(folder))


@pytest.mark.parametrize("name", NAMES)
def test_one_is_read_alone(folder, name):
    for other in {*NAMES} - {name}:
        shutil.rmtree(folder / folder_for(other))
    found = Pathways.from_pretrained(folder, only=name)
    assert found.domains == [name]
    assert all(map(torch.equal, found[name].keep, _pathways()[name].keep))


def test_an_unknown_one_is_told_from_all(folder):
    with pytest.raises(UnknownNameError, match=r"'code'.*'law'"):
        Pathways.from_pretrained(folder, only="lwa")


def test_one_of_them_is_an_artefact_of_its_own(folder):
    found = Pathways.from_pretrained(folder, subfolder=folder_for("law"))
    assert found.domains == ["law"]


def test_a_save_over_them_leaves_nothing_behind(folder, tmp_path):
    write_pathways(_pathways(("code", "new")), folder, apart=True)
    assert Pathways.from_pretrained(folder).domains == ["code", "new"]
    assert not (folder / folder_for("law")).exists()
    _pathways().save_pretrained(folder)
    _pathways().save_pretrained(tmp_path / "y")
    assert not list((folder / "pathways").iterdir())
    assert (folder / "pathways.json").read_bytes() == (tmp_path / "y/pathways.json").read_bytes()


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_a_damaged_one_is_refused(folder, damage):
    damage(folder / folder_for("law") / "pathways.json")
    with pytest.raises(PathwaysError):
        Pathways.from_pretrained(folder)


LISTS = {
    "no list": ["code"],
    "text": "code",
    "nothing": None,
    "absolute": {"code": "/pathways/code-01234567"},
    "upwards": {"code": "pathways/../../code-01234567"},
    "upwards at once": {"code": "../code-01234567"},
    "backslashes": {"code": "pathways\\code-01234567"},
    "a drive": {"code": "C:/code-01234567"},
    "a device": {"code": "pathways/con"},
    "a stream": {"code": "pathways/code-01234567:x"},
    "control characters": {"code": "pathways/code\n-01234567"},
    "a line at its end": {"code": "pathways/code-01234567\n"},
    "zero": {"code": "pathways/code\0-01234567"},
    "nowhere": {"code": ""},
    "a number": {"code": 5},
    "deeper": {"code": "pathways/a/code-01234567"},
    "a name that is none": {"../code": "pathways/code-01234567"},
    "a reserved name": {"pooled": "pathways/code-01234567"},
    "one folder for two": {"a": "pathways/code-01234567", "b": "pathways/code-01234567"},
    "absent": {"code": "pathways/code-01234567"},
}


@pytest.mark.parametrize("value", LISTS.values(), ids=LISTS)
def test_a_wrong_list_is_refused(folder, value):
    before = _listing(folder.parent)
    set_field(folder / "pathways.json", ["apart"], value)
    for only in (None, "code"):
        with pytest.raises(ArtefactError):
            Pathways.from_pretrained(folder, only=only)
    assert _listing(folder.parent) == before


def test_one_of_another_name_or_base_is_refused(folder):
    law, code = (folder / folder_for(name) for name in ("law", "code"))
    for file in law.iterdir():
        shutil.copy(file, code)
    with pytest.raises(PathwaysError, match="'code'"):
        Pathways.from_pretrained(folder)
    write_pathways(_pathways(), folder, apart=True)
    set_field(law / "pathways.json", ["base", "revision"], "abc")
    with pytest.raises(MismatchError, match=r"'law'.*abc"):
        Pathways.from_pretrained(folder)


def test_one_that_stands_twice_is_refused(folder):
    meta = json.loads((folder / folder_for("law") / "pathways.json").read_text())
    for file in (folder / folder_for("law")).iterdir():
        shutil.copy(file, folder)
    set_field(folder / "pathways.json", ["apart"], {"law": folder_for("law")})
    assert meta["domains"][0]["name"] == "law"
    with pytest.raises(ArtefactError, match="twice"):
        Pathways.from_pretrained(folder)


def test_folders_are_readable_safe_and_never_shared():
    names = [*NAMES, "con", "NUL", "a" * 64, "a" * 63 + "b", "x.", "ß", "ss"]
    places = [folder_for(name) for name in names]
    assert len({place.lower() for place in places}) == len(names)
    assert list_apart({"apart": dict(zip(names, places, strict=True))})
    assert folder_for("code").startswith("pathways/code-")
    other = folder_for("code", taken=[folder_for("code")])
    assert other not in places
    assert other.startswith("pathways/code-")
