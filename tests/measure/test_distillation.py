"""sgatlin layers that learn a dense model's FFN blocks, one by one and together."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.healing import distilling
from hf_sparse_pathways.healing.checkpoints import Checkpoints
from hf_sparse_pathways.healing.distilling import EndToEnd
from hf_sparse_pathways.healing.reconstruction import (
    Reconstruction,
    in_place_of,
    observe,
    reconstruct,
)
from hf_sparse_pathways.measure.distillation import _batches, _draw
from hf_sparse_pathways.modeling.replacement import find_layers
from hf_sparse_pathways.sgatlin.start import start_linear
from tests.architectures import build, prompt
from tests.cli.commands import assert_error, run, run_well
from tests.texts import documents, save_documents, tiny_tokenizer

FFN = sp.SgatlinConfig(n_experts=16, n_channels=4, top_k=4, d_key=8)
TEXT = documents("code", count=20)
IDS = prompt()
ALONE = Reconstruction(steps=60, batch=64, learning_rate=1e-2)
TOGETHER = EndToEnd(steps=12, batch_size=4, learning_rate=5e-3, save_steps=4)


def take(model, **options):
    settings = {"blocks": [2, 0], "reconstruction": ALONE, "end_to_end": TOGETHER, **options}
    return sp.distil(model, tiny_tokenizer(), TEXT, FFN, **settings)


@pytest.fixture(scope="module")
def made():
    model = build("llama")
    return model, take(model)


def _perplexity(model):
    """Score the held-out windows one by one."""
    _, test = _draw(model, tiny_tokenizer(), TEXT, (65_536, 16_384), None, 0)
    total = tokens = 0
    with torch.no_grad():
        for window in test:
            ids = torch.tensor([window.ids])
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


# -- the start -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_start_is_the_best_of_its_rank():
    """With gates that are one, and as many channels as dimensions, it is the linear map itself."""
    torch.manual_seed(0)
    x, matrix = torch.randn(400, 6), torch.randn(6, 6)
    y = x @ matrix
    errors = []
    for channels in (2, 4, 6, 8):
        layer = sp.SgatlinFFN(sp.SgatlinConfig(n_experts=4, n_channels=channels, top_k=2), 6)
        layer.router.forward = lambda x, removed=None, c=channels: (  # noqa: ARG005
            torch.full((len(x), c, 2), 0.5),
            torch.randint(0, 4, (len(x), c, 2)),
        )
        start_linear(layer, x, y)
        errors.append(float((layer(x) - y).square().sum()))
        best = float(torch.linalg.svdvals(y)[channels:].square().sum())
        assert errors[-1] == pytest.approx(best, abs=1e-2 * float(y.square().sum()))
    assert errors[0] > errors[1] > errors[2]


def test_a_layer_begins_better_than_drawn_and_learns():
    model = build("llama")
    train, _ = _draw(model, tiny_tokenizer(), TEXT, (65_536, 16_384), None, 0)
    x, y = observe(model, find_blocks(model)[1], _batches(train))
    drawn = sp.SgatlinFFN(FFN, 32)
    errors = [_error(drawn, x, y)]
    for steps in (0, 200):
        settings = Reconstruction(steps=steps, batch=128, learning_rate=1e-2)
        errors.append(_error(reconstruct(x, y, FFN, settings, Checkpoints(None, {})), x, y))
    assert errors[0] > errors[1] > 1.2 * errors[2]


@torch.no_grad()
def _error(layer, x, y):
    return float((layer(x) - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
@torch.no_grad()
def test_a_function_in_a_block_s_place(name):
    model, ids = build(name), prompt()
    expected = model(ids).logits
    block, other = find_blocks(model)[0], build(name)
    matrix = torch.randn(block.d_in, block.d_out)
    with in_place_of(block, matrix.__rmatmul__):
        found = model(ids).logits
    seen = []
    theirs = find_blocks(other)[0]
    theirs.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    theirs.outgoing.register_forward_hook(lambda *_: seen.pop() @ matrix)
    assert torch.equal(found, other(ids).logits)
    assert torch.equal(model(ids).logits, expected)


# -- the whole -----------------------------------------------------------------------------------


@torch.no_grad()
def test_figures_are_those_of_the_models(made):
    model, found = made
    assert [stand.block for stand in found.stands[::3]] == [
        "model.layers.0.mlp",
        "model.layers.2.mlp",
    ]
    assert [stand.name for stand in found.stands[:3]] == ["sgatlin", "linear map", "mean output"]
    assert found.stands[0].flops == FFN.flops(32) / (6 * 48 * 32)
    assert found.stands[2].error == pytest.approx(1.0)
    assert found.stands[1].error < 1.0
    names = ["dense", "linear maps", "mean outputs", "sgatlin, each by itself"]
    assert [whole.name for whole in found.wholes] == [*names, "sgatlin, then end to end"]
    assert found.wholes[0].perplexity == pytest.approx(_perplexity(model), rel=1e-4)
    assert found.wholes[-1].perplexity == pytest.approx(_perplexity(found.model), rel=1e-4)
    assert found.tokens[0] > 3 * found.tokens[1] > 0
    assert "| sgatlin, then end to end |" in found.to_markdown()


def test_the_student_is_the_dense_model_but_for_its_blocks(made):
    model, found = made
    student = found.model
    assert student.config.ffn_blocks == [0, 2]
    assert len(find_layers(student)) == 2
    assert [block.name for block in find_blocks(student)] == ["model.layers.1.mlp"]
    own = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        if ".mlp." not in name or ".1.mlp." in name:
            assert torch.equal(own[name], parameter), name
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, build("llama")(IDS).logits)


def test_end_to_end_training_brings_the_predictions_nearer(made):
    model, found = made
    apart = take(model, end_to_end=EndToEnd(steps=0), scored_tokens=40)
    assert apart.tokens[0] == found.tokens[0]
    assert apart.tokens[1] <= 40 < found.tokens[1]
    train, _ = _draw(model, tiny_tokenizer(), TEXT, (65_536, 16_384), None, 0)
    divergences = []
    for student in (apart.model, found.model):
        total = 0.0
        for batch in _batches(train):
            with torch.no_grad():
                own, theirs = (run_model(m, batch).log_softmax(-1) for m in (student, model))
            total += float(((theirs.exp() * (theirs - own)).sum(-1) * batch.mask).sum())
        divergences.append(total)
    assert divergences[1] < 0.9 * divergences[0]


@torch.no_grad()
def test_it_is_saved_loaded_and_has_domains(made, tmp_path):
    _, found = made
    found.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(found.model)
    assert torch.allclose(again(IDS).logits, found.model(IDS).logits, atol=1e-6)
    texts = {name: documents(name, 8, 30) for name in ("code", "law")}
    profile = sp.profile(again, tiny_tokenizer(), texts, max_length=32)
    pathways = sp.select(again, profile, sparsity=0.3, experts=0.5)
    sparse = sp.SparsePathwaysForCausalLM.from_dense(again, pathways)
    assert pathways.expert_sparsity("code") == 0.5
    assert 0.2 < pathways.sparsity("code") < 0.4
    sparse.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for domain in ("code", ["code", "law"], None):
        expected = sparse(IDS, domain=domain).logits
        assert torch.allclose(loaded(IDS, domain=domain).logits, expected, atol=1e-5)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", domain="code")
    assert torch.allclose(alone(IDS).logits, sparse(IDS, domain="code").logits, atol=1e-4)
    assert torch.equal(sparse(IDS).logits, again(IDS).logits)


# -- interrupted ---------------------------------------------------------------------------------


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(made, tmp_path, monkeypatch):
    model, found = made
    fits = []
    fit = reconstruct.__globals__["_fit"]
    monkeypatch.setitem(reconstruct.__globals__, "_fit", lambda *a: fits.append(1) or fit(*a))
    trainer = distilling._Distiller.__init__

    def stopping(self, **given):
        trainer(self, **given, callbacks=[_Stop()])

    monkeypatch.setattr(distilling._Distiller, "__init__", stopping)
    with pytest.raises(KeyboardInterrupt):
        take(model, work_folder=tmp_path)
    monkeypatch.setattr(distilling._Distiller, "__init__", trainer)
    assert len(fits) == 2
    again = take(model, work_folder=tmp_path)
    assert len(fits) == 2, "finished blocks are read"
    assert again.stands == found.stands
    for mine, theirs in zip(find_layers(again.model), find_layers(found.model), strict=True):
        assert torch.allclose(mine.u, theirs.u, atol=1e-5)
    shutil.rmtree(next(tmp_path.glob("together-*")))
    take(model, work_folder=tmp_path, reconstruction=Reconstruction(steps=1, batch=8))
    assert len(fits) == 4, "other settings begin anew"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_learn_in_float32_and_keep_theirs(dtype, made):
    dense = build("llama").to(dtype)
    found = take(dense)
    assert {p.dtype for p in found.model.parameters()} == {dtype}
    assert found.model(IDS).logits.dtype == dtype
    for own, theirs in zip(found.wholes, made[1].wholes, strict=True):
        assert own.name == theirs.name
        assert own.perplexity == pytest.approx(theirs.perplexity, rel=0.03)
    assert all(p.requires_grad for p in found.model.parameters())
    assert not any(layer._forward_hooks for layer in find_layers(found.model))


# -- commands and refusals -----------------------------------------------------------------------


def test_by_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    build("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = save_documents(tmp_path / "code", "code", count=12, words=40)
    asked = ("distil", tmp_path / "dense", "--text", text, "--output", tmp_path / "x")
    small = ("--experts", "16", "--channels", "4", "--top-k", "4", "--d-key", "8")
    assert_error(run(*asked, *small, "--blocks", "1-2"), "numbers from 0")
    assert_error(run(*asked, *small, "--blocks", "3"), "no block 3: the model has 3")
    assert_error(run(*asked, "--experts", "15", "--blocks", "1"), "square")
    said = run_well(*asked, *small, "--blocks", "1,2", "--steps", "5", "--together", "3")
    assert "sgatlin, then end to end" in said
    values = json.loads((tmp_path / "x" / "distillation.json").read_text())
    assert len(values["wholes"]) == 5
    assert "| dense |" in (tmp_path / "x" / "distillation.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert model.config.ffn_blocks == [1, 2]


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"blocks": [3]}, "no block 3: the model has 3"),
        ({"blocks": []}, "No block was named"),
        ({"max_tokens": 1}, "max_tokens .* from 2, got 1"),
        ({"scored_tokens": 0}, "scored_tokens .* from 2, got 0"),
        ({"scored_tokens": 2.5}, "scored_tokens .* from 2, got 2.5"),
    ):
        with pytest.raises(sp.PathwaysError, match=message):
            take(build("llama"), **options)
    with pytest.raises(sp.PathwaysError):
        sp.distil(build("llama"), tiny_tokenizer(), ["def"], FFN, blocks=[0])
    config = sp.SparsePathwaysConfig.from_base(build("llama").config, ffn=FFN, ffn_blocks=[1])
    with pytest.raises(sp.PathwaysError, match="name all blocks at once"):
        take(AutoModelForCausalLM.from_config(config), blocks=[0])
    for settings in ({"steps": -1}, {"learning_rate": 0.0}):
        for kind in (Reconstruction, EndToEnd):
            with pytest.raises(sp.PathwaysError, match="got"):
                kind(**settings)
    config = build("llama").config
    for numbers in ([0, 0], [-1], "0", [], [True]):
        with pytest.raises(sp.PathwaysError, match="ffn_blocks takes"):
            sp.SparsePathwaysConfig.from_base(config, ffn=FFN, ffn_blocks=numbers)
    with pytest.raises(sp.PathwaysError, match="3 FFN blocks, numbered"):
        AutoModelForCausalLM.from_config(
            sp.SparsePathwaysConfig.from_base(config, ffn=FFN, ffn_blocks=[3])
        )
    with pytest.raises(sp.PathwaysError, match="beside ffn"):
        sp.SparsePathwaysConfig.from_base(config, ffn_blocks=[0])
