"""Some hundred cases of ``fuzz``, which runs on as a command; and that it can fail."""

import pytest

from hf_sparse_pathways.pathways import parts
from tests.pathways import fuzz

CASES = 400


def test_changed_pairs_are_read_or_refused(tmp_path):
    tried, read, failed = fuzz.run(range(CASES), tmp_path)
    assert failed == 0
    assert tried == CASES
    assert CASES / 20 < read < CASES / 2, "both are tried"


def test_a_defect_is_found_and_told_with_its_seed(tmp_path, monkeypatch, capsys):
    def careless(*_):
        raise IndexError("list index out of range")

    monkeypatch.setattr(parts, "check_finite", careless)
    assert fuzz.run(range(30), tmp_path)[2] > 0
    assert "IndexError" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_is_always_the_same_case(seed, tmp_path):
    contents = []
    for name in "ab":
        (tmp_path / name).mkdir()
        path = tmp_path / name / "pathways.json"
        _, meta, data = fuzz.make_pair(path.parent)
        fuzz.make_case(path, meta, data, seed)
        contents.append([path.read_bytes(), path.with_suffix(".safetensors").read_bytes()])
    assert contents[0] == contents[1]
