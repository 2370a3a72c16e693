"""Models whose FFNs are layers of another kind, while they train."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse_pathways as sp
from hf_sparse_pathways.modeling.replacement import find_layers
from tests.architectures import build, prompt
from tests.replaced import EVERY_KIND, IDS, KINDS, make


def _gradients(model):
    model.zero_grad()
    output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@EVERY_KIND
@pytest.mark.parametrize("base", ["llama", "opt"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["modern", "reentrant"])
def test_checkpointing_gives_the_same_gradients(ffn, base, reentrant):
    config = build(base).config
    for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = make(ffn, config).train()
    loss, expected = _gradients(model)
    assert all(
        gradient.abs().sum() > 0 for n, gradient in expected.items() if "k_proj.bias" not in n
    )
    if reentrant and ffn.kind == "moe":
        with pytest.raises(sp.PathwaysError, match="use_reentrant=False"):
            model.activation_checkpointing_enable({"use_reentrant": True})
        return
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again, found = _gradients(model)
    assert torch.equal(loss, again)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_losses_of_a_mixture_are_added_while_it_trains():
    ffn = sp.MoeConfig(n_experts=4, top_k=2, d_ff=8, load_balancing=0.5, z_loss=0.25)
    model = make(ffn)
    plain = model(IDS, labels=IDS).loss
    inputs = []
    for layer in find_layers(model):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    model.train()
    trained = model(IDS, labels=IDS).loss
    added = 0.0
    for layer, x in zip(find_layers(model), inputs, strict=True):
        logits = layer.router(x)
        added = added + layer.losses(logits, logits.topk(2).indices)
    assert torch.allclose(trained, plain + added, atol=1e-5)
    as_tuple = model(IDS, labels=IDS, return_dict=False)
    assert torch.allclose(as_tuple[0], trained, atol=1e-5)
    assert model(IDS).loss is None
    with torch.no_grad():
        assert torch.equal(model(IDS, labels=IDS).loss, plain)


def test_losses_of_a_batchs_parts_add_up_to_their_mean(tmp_path):
    """Parts of a batch, whose gradients ``Trainer`` adds up, divide by its number of items."""
    ffn = sp.MoeConfig(n_experts=4, top_k=2, d_ff=8, load_balancing=0.5, z_loss=0.25)
    model = make(ffn).train()
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    parts = [{"input_ids": ids, "labels": ids} for ids in prompt(4, 9, seed=3).split(1)]
    items = Trainer(model=model, args=arguments)._get_num_items_in_batch(parts, "cpu")
    losses = [(model(**one, num_items_in_batch=items).loss, model(**one).loss) for one in parts]
    summed, total = (sum(own) for own in zip(*losses, strict=True))
    assert torch.allclose(summed, total / len(parts), atol=1e-5)


@pytest.mark.parametrize("kind", ["sgatlin", "moe"])
def test_trainer(kind, tmp_path):
    ffn = KINDS[kind]
    model = make(ffn).train()
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in prompt(8, 9, seed=3)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(model.state_dict()[name], value) for name, value in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, model.eval()(IDS).logits, atol=1e-6)
