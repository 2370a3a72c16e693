"""Commands under a launcher, as far as one process can tell; tests/launched has several."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_sparse_pathways.cli.launch import count_processes, join_launch
from hf_sparse_pathways.cli.loading import unfinished_work
from tests.cli.commands import assert_error, run, run_well


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_without_a_launcher_there_is_one_process(missing, monkeypatch):
    assert count_processes() == 2
    monkeypatch.delenv(missing)
    assert count_processes() == 1
    assert join_launch() is None


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("command", ["heal", "compare", "generate", "info", "push"])
def test_commands_that_share_nothing_refuse(command):
    ran = run(command, "folder")
    assert ran.status == 1
    told = f"error (process 1 of 2): {command} was started in 2 processes"
    assert ran.err.startswith(told)
    assert "profile, build, evaluate" in ran.err


@pytest.mark.usefixtures("second_of_two")
def test_help_is_shown():
    assert "profile" in run_well("--help")


def test_one_process_instead_of_several_is_told(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert join_launch() is None
    assert caplog.text == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert join_launch() is None
    assert "--multi_gpu" in caplog.text


def test_an_error_without_a_launcher_names_no_process():
    assert_error(run("info", "no such folder"), "no such folder")


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    folder = tmp_path / "sparse_pathways" / "unfinished"
    folder.mkdir(parents=True)
    return folder


def test_what_another_process_has_just_deleted_is_no_error(unfinished):
    (unfinished / "seen and gone").symlink_to(unfinished / "nothing")
    with unfinished_work("job") as work:
        assert work.parent == unfinished


@pytest.mark.usefixtures("unfinished")
def test_what_another_process_deletes_while_this_one_leaves_is_no_error(monkeypatch):
    is_file = Path.is_file

    def delete(path):
        found = is_file(path)
        path.unlink(missing_ok=True)
        return found

    def leave():
        with unfinished_work("job") as work:
            work.mkdir()
            (work / "sums").write_bytes(b"0")
            monkeypatch.setattr(Path, "is_file", delete)
            raise SystemExit

    with pytest.raises(SystemExit):
        leave()
