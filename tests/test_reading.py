"""Reads stay within bounds, and never wait."""

import json
import os

import pytest

from hf_sparse_pathways import reading
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.limits import MOST_DEPTH
from hf_sparse_pathways.reading import NUMBER, check_kinds, parse_json, read_bytes

GOOD = [{}, [], 0, 2**64 - 1, -(2**63), 1.5, "é", None, True, {"a": [{"b": [1, None]}]}]


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_json_is_parsed(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


BAD = {
    "no JSON": "{",
    "nothing": "",
    "two values": "1 2",
    "no UTF-8": b'"\xff"',
    "a key twice": '{"a": 1, "a": 1}',
    "a key twice, deeper": '[{"a": {"b": 1, "b": 2}}]',
    "NaN": "[NaN]",
    "infinity": "-Infinity",
    "too large": "1e999",
    "65 bits": str(2**64),
    "65 bits, negative": str(-(2**63) - 1),
    "a million digits": "1" * 10**6,
    "half a surrogate pair": '"\\ud800"',
    "half a pair as a key": '{"\\udfff": 1}',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "a little too deep": "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
}


@pytest.mark.parametrize("name", BAD)
def test_doubtful_json_is_refused(name):
    with pytest.raises(ValueError, match=r"."):
        parse_json(BAD[name])


def test_json_may_be_as_deep_as_said():
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH)


def test_a_file_of_the_largest_size_is_read_and_no_larger_one(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ArtefactError, match="more than the 4 bytes"):
        read_bytes(tmp_path / "a", 4)


NO_FILES = {
    "absent": lambda _: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to a pipe": lambda path: (os.mkfifo(f"{path}.x"), path.symlink_to(f"{path}.x")),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    NO_FILES[kind](tmp_path / "a")
    with pytest.raises(ArtefactError, match="a cannot be read"):
        read_bytes(tmp_path / "a", 100)


def test_no_file_stays_open(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        reading.os, "fstat", lambda handle: opened.append(handle) or os.stat(tmp_path)
    )
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(ArtefactError):
        read_bytes(tmp_path / "a", 100)
    monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_kinds_are_checked():
    values = {"a": 1, "b": 1.5, "c": True, "d": None, "e": "x"}
    check_kinds(values, ("a", "b"), *NUMBER)
    check_kinds(values, ("b", "d"), *NUMBER, None)
    for name, kinds in (("c", NUMBER), ("d", NUMBER), ("e", NUMBER), ("b", (int,))):
        with pytest.raises(TypeError, match=name):
            check_kinds(values, (name,), *kinds)
    with pytest.raises(KeyError):
        check_kinds(values, ("f",), int)
