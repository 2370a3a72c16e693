"""What a training run has stored is gone on from, or refused before anything has changed."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.healing.checkpoints import Checkpoints
from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.healing.training import CurvePoint, Stage, _Record, _Run
from tests.healing.healings import text

POINT = CurvePoint(step=0, tokens=0, seconds=1.0, training=None, validation=2.0)
RECORD = asdict(_Record(step=2, tokens=20, seconds=1.5, loss=0.5, steps=1, curve=[POINT]))


def _run(folder, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 4)
    checkpoints = Checkpoints(folder, {"a": "plan"})
    run = _Run(model, text(), None, HealingSettings(), checkpoints, Stage(label="x"))
    return run, model


@pytest.fixture
def path(tmp_path):
    run, model = _run(tmp_path)
    run.record = _Record.of(RECORD)
    run.best = {name: p.detach() + 1 for name, p in model.named_parameters()}
    for parameter in model.parameters():
        moments = {m: torch.ones_like(parameter) for m in ("exp_avg", "exp_avg_sq")}
        run.optimizer.optimizer.state[parameter] = moments
    run.store()
    (file,) = tmp_path.iterdir()
    return file


def _record(**fields):
    return lambda path: save_file(
        load_file(path), path, metadata={"record": json.dumps({**RECORD, **fields})}
    )


def _text(record):
    return lambda path: save_file(load_file(path), path, metadata={"record": record})


def _tensors(change):
    def damage(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(path)), path, metadata=metadata)

    return damage


def _without(group):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(f"{group}/")}


POINT_VALUES = asdict(POINT)
DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no record": lambda path: save_file(load_file(path), path),
    "no JSON": _text("{"),
    "deep": _text("[" * 100_000),
    "a list": _text("[]"),
    "NaN": _text(json.dumps({**RECORD, "seconds": float("nan")})),
    **{f"step {value!r}": _record(step=value) for value in (-1, "2", True, None, 1.5, 10**30)},
    "no curve": _record(curve=[]),
    "a curve of text": _record(curve=["x"]),
    "a loss that is text": _record(curve=[{**POINT_VALUES, "validation": "x"}]),
    "a point with more": _record(curve=[{**POINT_VALUES, "more": 1}]),
    "a field more": _record(more=1),
    "forked nowhere": _record(forked=None),
    "forked wrongly": _record(forked={"step": "x"}),
    **{
        f"without {group}": _tensors(_without(group)) for group in ("parameters", "best", "exp_avg")
    },
    "a parameter less": _tensors(lambda t: {k: v for k, v in t.items() if k != "best/bias"}),
    "one that would be spread": _tensors(lambda t: {**t, "parameters/weight": torch.zeros(1, 3)}),
    "a wider one": _tensors(lambda t: {**t, "best/weight": torch.zeros(4, 9)}),
    "another dtype": _tensors(lambda t: {**t, "exp_avg_sq/bias": torch.zeros(4).double()}),
    "an unknown parameter": _tensors(lambda t: {**t, "parameters/more": torch.zeros(4)}),
    "no group": _tensors(lambda t: {**t, "weight": torch.zeros(4, 3)}),
}


def test_a_run_goes_on_from_what_it_stored(path):
    run, model = _run(path.parent, seed=1)
    run.resume()
    assert asdict(run.record) == RECORD
    assert torch.equal(model.weight, load_file(path)["parameters/weight"])
    assert torch.equal(run.best["bias"], load_file(path)["best/bias"])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_changes_nothing(damage, path):
    DAMAGE[damage](path)
    run, model = _run(path.parent, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ArtefactError, match=rf"{path.name}.*Delete it"):
        run.resume()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not run.optimizer.optimizer.state
