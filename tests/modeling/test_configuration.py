"""Our fields of a saved configuration are what they should be, or refused as the file is read."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig
from tests.architectures import build, random_masks

ANY = [None, True, 5, -1, 1.5, "\x1b[2J", [], ["x"], [5], ["a\nb"], {}, {"x": 1}, 10**30]
RIGHT = {
    "domains": [None, [], ["x"]],
    "default_domain": [None],
    "executor": [],
    "pathways_format": [],
    "base_model_type": [],
    "neuron_order": [None],
    "prompt_pathways": [None, {}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dense, folder = build("llama"), tmp_path_factory.mktemp("model")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    sp.SparsePathwaysForCausalLM.from_dense(dense, paths).save_pretrained(folder)
    return folder


@pytest.fixture
def config(folder):
    path = folder / "config.json"
    before = path.read_text()
    yield path
    path.write_text(before)


def _set(path, name, value):
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


@pytest.mark.parametrize("name", RIGHT)
def test_a_field_of_the_wrong_kind_is_refused(name, config):
    for value in ANY:
        _set(config, name, value)
        if value in RIGHT[name] and value is not True:
            AutoConfig.from_pretrained(config.parent)
            continue
        with pytest.raises(PathwaysError):
            AutoConfig.from_pretrained(config.parent)
        with pytest.raises(PathwaysError):
            AutoModelForCausalLM.from_pretrained(config.parent)


@pytest.mark.parametrize("value", ["sparse_pathways", "no_such_model", "../llama"])
def test_a_base_that_is_none_is_refused(value, config):
    _set(config, "base_model_type", value)
    made = type(SparsePathwaysConfig.from_base(build("llama").config))
    for read in (AutoConfig, made):
        with pytest.raises(PathwaysError, match="base architecture"):
            read.from_pretrained(config.parent)


@pytest.mark.parametrize("name", ["pathways_format", "base_model_type"])
def test_a_missing_field_is_refused(name, config):
    fields = json.loads(config.read_text())
    del fields[name]
    config.write_text(json.dumps(fields))
    with pytest.raises(PathwaysError):
        AutoConfig.from_pretrained(config.parent)


def test_a_repository_cannot_name_code_to_run(config, tmp_path):
    (config.parent / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _set(config, "auto_map", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    AutoModelForCausalLM.from_pretrained(config.parent)
    assert not (tmp_path / "ran").exists()
