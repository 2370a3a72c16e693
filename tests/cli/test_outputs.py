"""Output folders are whole or absent, wherever they lie."""

import os
from pathlib import Path

import pytest

from hf_sparse_pathways import outputs
from hf_sparse_pathways.outputs import check_output, written_whole
from tests.cli.commands import assert_error, content, run, run_well


def _write(output, name, text):
    before = output.exists()
    with written_whole(output) as folder:
        assert output.exists() == before
        (folder / name).write_text("half")
        (folder / name).write_text(text)


def _broken_rename(monkeypatch, call):
    own, calls = Path.rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == call:
            raise OSError(5, "Input/output error")
        return own(self, target)

    monkeypatch.setattr(outputs.Path, "rename", rename)


@pytest.mark.parametrize("call", [1, 2])
def test_an_earlier_output_survives_a_failed_rename(tmp_path, monkeypatch, call):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("hours of work")
    before = content(tmp_path)
    _broken_rename(monkeypatch, call)
    with pytest.raises(OSError, match="Input/output"):
        _write(tmp_path / "out", "weights", "new")
    assert content(tmp_path) == before


def test_the_remains_of_a_crash_do_not_stand_in_the_way(tmp_path):
    """Another run's folder beside the output is not ours to delete, and no obstacle."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    (tmp_path / ".out.earlier").mkdir()
    (tmp_path / ".out.earlier" / "a").write_text("of a crashed run")
    _write(tmp_path / "out", "a", "new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert (tmp_path / ".out.earlier" / "a").read_text() == "of a crashed run"


@pytest.mark.parametrize("name", ["out", "v1.2", "deep/er/out"])
def test_an_output_is_whole_or_absent(tmp_path, name):
    output = tmp_path / name
    with pytest.raises(TypeError):
        _write(output, "a", 5)
    assert not output.exists()
    assert all(path.is_dir() for path in tmp_path.rglob("*"))
    _write(output, "a", "whole")
    assert os.listdir(output) == ["a"]
    assert os.listdir(output.parent) == [output.name]


def test_a_relative_output_is_where_the_command_started(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_well("build", places.dense, *places.texts, "--output", "out")
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    """As a volume that is mounted into a container."""
    (tmp_path / "out" / "old").mkdir(parents=True)
    (tmp_path / "out" / "old.txt").write_text("old")
    monkeypatch.setattr(outputs.Path, "is_mount", lambda path: path.name == "out")
    _write(tmp_path / "out", "new.txt", "new")
    assert content(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_a_mounted_output_is_as_it_was_after_an_error(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    monkeypatch.setattr(outputs.Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "out") as folder:
        (folder / "new.txt").write_text(str(1 / 0))
    assert content(tmp_path) == {"out": None, "out/old.txt": b"old"}


UNWRITABLE = {
    "a file system that takes no folders": lambda _: Path("/proc/out"),
    "a name that is too long": lambda folder: folder / ("x" * 300),
    "below a file": lambda folder: folder / "file" / "out",
}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("command", ["profile", "build", "analyze"])
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_an_output_that_cannot_be_made_is_refused_before_the_work(places, tmp_path, command, kind):
    (tmp_path / "file").write_text("mine")
    output = UNWRITABLE[kind](tmp_path)
    ran = run(command, tmp_path / "no model", *places.texts, "--output", output)
    assert_error(ran, f"{output} cannot be written", "Choose another --output")
    assert content(tmp_path) == {"file": b"mine"}


def test_looking_whether_an_output_can_be_made_leaves_nothing(tmp_path):
    check_output(tmp_path / "deep" / "out", overwrite=False, marker="pathways.json")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("deep", ["out", "absent/out"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    places, tmp_path, monkeypatch, deep
):
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)
    ran = run("build", tmp_path / "no model", *places.texts, "--output", tmp_path / deep)
    assert_error(ran, "cannot be written", "--output")
