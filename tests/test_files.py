"""Files are whole or absent, and what cannot be read is named."""

import json
import os
import stat

import pytest
import torch

from hf_sparse_pathways import files
from hf_sparse_pathways.errors import ArtefactError, UnknownNameError
from hf_sparse_pathways.files import (
    check_finite,
    read_json,
    read_pair,
    write_atomically,
    write_between,
    write_pair,
)

TENSORS = {"a": torch.arange(5), "b": torch.tensor([True, False])}


def _all(_, header):
    return header


META = {"format": 1, "name": "médecine", "list": [1, None, True, 0.5]}


@pytest.mark.parametrize("earlier", [None, b"old and longer content"])
@pytest.mark.parametrize("content", [b"", b"new", bytes(range(256)) * 1000])
def test_a_file_is_written_whole(tmp_path, content, earlier):
    path = tmp_path / "deep" / "er" / "file.bin"
    if earlier is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(earlier)
    write_atomically(path, content)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("earlier", ["", "\n", "old\nlines\n"])
def test_text_goes_between_the_markers_and_nowhere_else(tmp_path, earlier):
    path = tmp_path / "README.md"
    path.write_text(f"one\n<!-- a -->{earlier}<!-- /a -->\ntwo é\n", encoding="utf-8")
    for content in ("| new |", "newer"):
        write_between(path, "<!-- a -->", "<!-- /a -->", content)
        expected = f"one\n<!-- a -->\n{content}\n<!-- /a -->\ntwo é\n"
        assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("text", ["", "<a>", "</a>", "</a><a>", "<a><a></a>", "<a></a></a>"])
def test_without_its_markers_a_file_stays_as_it_is(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ArtefactError, match="once each"):
        write_between(path, "<a>", "</a>", "new")
    assert path.read_text() == text


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", b"x")
        assert os.umask(mask) == mask, "the mask is as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("name", ["fdopen", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(files.os, name, fail)
    with pytest.raises(error):
        write_atomically(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_pair_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "x.json"
    write_pair(path, META, TENSORS)
    meta, tensors = read_pair(path, path.with_suffix(".safetensors"), 1, _all)
    assert {name: meta[name] for name in META} == META
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12)[::2],
        torch.ones(1).expand(5),
        torch.zeros(0),
        torch.tensor(3.0),
    ],
    ids=["transposed", "strided", "expanded", "empty", "scalar"],
)
def test_views_are_written_as_their_values(tmp_path, view):
    path = tmp_path / "x.json"
    write_pair(path, META, {"view": view, "same": view, "part": torch.atleast_1d(view)[:1]})
    tensors = read_pair(path, path.with_suffix(".safetensors"), 1, _all)[1]
    assert torch.equal(tensors["view"], view)
    assert torch.equal(tensors["same"], view)
    assert torch.equal(tensors["part"], torch.atleast_1d(view)[:1])


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "x.json"
    for value in (float("nan"), float("inf"), object(), b"bytes"):
        with pytest.raises((ValueError, TypeError)):
            write_pair(path, {"format": 1, "value": value}, TENSORS)
    assert os.listdir(tmp_path) == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.json"
    write_pair(path, META, TENSORS)
    tensors = path.with_suffix(".safetensors")

    def choose(_, header):
        other = tmp_path / "other"
        other.write_bytes(tensors.read_bytes())
        other.rename(tensors)
        return header

    with pytest.raises(ArtefactError, match="changed while it was read"):
        read_pair(path, tensors, 1, choose)


@pytest.mark.parametrize(("newest", "fits"), [(1, False), (2, False), (3, True), (4, True)])
def test_formats_up_to_the_newest_are_read(tmp_path, newest, fits):
    path = tmp_path / "x.json"
    write_pair(path, {"format": 3}, TENSORS)
    if fits:
        assert read_pair(path, path.with_suffix(".safetensors"), newest, _all)[0]["format"] == 3
        return
    with pytest.raises(ArtefactError, match=rf"x\.json has format 3.* up to {newest}"):
        read_pair(path, path.with_suffix(".safetensors"), newest, _all)


@pytest.mark.parametrize("text", ["NaN", "[NaN]", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'])
def test_numbers_of_a_description_are_finite(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("value", [[], "x", 1, None, True])
def test_a_description_is_an_object(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(ArtefactError, match="not a JSON object"):
        read_json(tmp_path / "x.json")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"absent\.json cannot be read: No such file") as caught:
        read_json(tmp_path / "absent.json")
    assert "not valid JSON" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinities_and_nan_are_counted(bad, dtype):
    values = torch.ones(7, dtype=dtype)
    check_finite("x", values)
    values[[2, 5]] = bad
    with pytest.raises(ArtefactError, match="x holds 2 values"):
        check_finite("x", values)


def test_infinities_that_cancel_are_found():
    with pytest.raises(ArtefactError, match="2 values"):
        check_finite("x", torch.tensor([float("inf"), 0.0, -float("inf")]))


@pytest.mark.parametrize(
    "values",
    [
        torch.full((9,), 60000.0, dtype=torch.float16),
        torch.full((9,), 1.7e308, dtype=torch.float64),
        torch.tensor([True]),
        torch.tensor([2**62]),
        torch.zeros(0),
    ],
    ids=["float16", "float64", "bool", "int64", "empty"],
)
def test_finite_values_with_an_infinite_sum_are_fine(values):
    check_finite("x", values)


def test_an_unknown_name_error_lists_what_is_known():
    message = str(UnknownNameError("domain", "lwa", ["law", "code"]))
    assert message == "Unknown domain 'lwa'. Did you mean 'law'? Known: 'law', 'code'."
    assert str(UnknownNameError("domain", 5, [])) == "Unknown domain 5. Known: none."


def test_the_codes_digest_is_that_of_every_file(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    seen = set()
    for name, text in (("a.py", "1"), ("part/b.py", "1"), ("part/b.py", "2"), ("c.txt", "1")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
        seen.add(files.code_digest.__wrapped__())
    assert len(seen) == 3
