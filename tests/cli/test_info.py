"""``info`` shows what somebody else has written, and neither obeys it nor runs out of memory."""

import json
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.cli import info
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape
from tests.architectures import build, random_masks
from tests.cli.commands import assert_error, run, run_well
from tests.pathways.corruption import set_field
from tests.pathways.hostile import JSON

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e[bold]x[/bold]\r\n"


@pytest.fixture
def folder(tmp_path):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    text = {"source": EVIL, "tokens": 5, EVIL: EVIL}
    made = {"method": EVIL, "allocation": EVIL, "ridge": EVIL, "text": text, EVIL: [EVIL]}
    by_domain = {name: replace(one, provenance=made) for name, one in paths.by_domain.items()}
    replace(paths, by_domain=by_domain).save_pretrained(tmp_path)
    set_field(tmp_path / "pathways.json", ("base", "name"), EVIL)
    return tmp_path


def test_a_terminal_obeys_nothing(folder):
    shown = run_well("info", folder)
    assert shown.replace("\n", "").isprintable()
    assert "\\x1b[2J" in shown
    values = json.loads(run_well("info", folder, "--json"))
    assert values["domains"]["code"]["method"] == EVIL


@pytest.mark.parametrize("dtype", ["load", "nn", "Tensor", "", None, 5, [], {}, "float64", "int8"])
def test_a_dtype_that_is_none_is_float32(dtype, folder):
    (folder / "config.json").write_text(json.dumps({"dtype": dtype}))
    assert run("info", folder).status == 0


@pytest.mark.parametrize("damage", [name for name in JSON if " name" in name or "key" in name])
def test_an_error_is_one_line(damage, folder):
    JSON[damage](folder / "pathways.json")
    ran = run("info", folder)
    assert_error(ran)
    assert ran.err.strip().isprintable()


def test_blocks_that_are_only_said_to_be_large_are_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "MOST_TESTED", 2**16)
    shape = BlockShape(name="x", d_in=2**12, d_ff=2**5, d_out=2**12, branches=2)
    base = BaseModel(name="", revision=None, model_type="llama", blocks=(shape,))
    keep = BlockPathway(keep=torch.ones(shape.d_ff, dtype=torch.bool))
    pathways = sp.Pathways(base=base, by_domain={"code": sp.Pathway(blocks=(keep,))})
    pathways.save_pretrained(tmp_path)
    monkeypatch.setattr("hf_sparse_pathways.ffn.verdicts.judge_all", pytest.fail)
    assert "not tested" in run_well("info", tmp_path)
