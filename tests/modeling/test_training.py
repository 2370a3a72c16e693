"""Gradients through pathways, with checkpointing, Trainer and adapters."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_sparse_pathways as sp
from tests.architectures import build, prompt, random_masks, zeroed

IDS = prompt(2, 9)


def _sparse(name="llama", **arguments):
    dense = build(name)
    masks = random_masks(dense)
    paths = sp.Pathways.from_masks(dense, masks)
    return dense, masks, sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


def _gradients(model, **arguments):
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "modern", "reentrant"])
def test_gradients_equal_those_of_the_zeroed_model(name, checkpointing):
    dense, masks, model = _sparse(name)
    reference = zeroed(dense, masks["code"]).train()
    model.train()
    for module in (*model.modules(), *reference.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    expected, found = _gradients(reference), _gradients(model, domain="code")
    masked = _ffn_leaf_names(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        if key.rpartition(".")[0] not in masked:
            assert torch.allclose(found[key], gradient, atol=1e-5), key
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def _ffn_leaf_names(model):
    """Leaves whose removed rows have no gradient here and a meaningless one in the zeroed model."""
    return {
        f"{attached.block.name}.{name}"
        for attached in model._attachment.blocks
        for name in attached.leaves
    }


def test_removed_neurons_get_no_gradient_and_kept_ones_do():
    _, masks, model = _sparse()
    _gradients(model, domain="code")
    for attached, keep in zip(model._attachment.blocks, masks["code"], strict=True):
        columns = attached.block.outgoing.weight.grad.abs().sum(0)
        assert (columns[~keep] == 0).all()
        assert (columns[keep] > 0).all()


def test_per_row_gradients_add_up():
    _, _, model = _sparse()
    both = _gradients(model, domain=["code", "law"])
    parts = []
    for row, name in enumerate(("code", "law")):
        model.zero_grad()
        ids = IDS[row : row + 1]
        model(ids, labels=ids, domain=name).loss.backward()
        parts.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, gradient in both.items():
        assert torch.allclose(gradient, (parts[0][key] + parts[1][key]) / 2, atol=1e-5), key


def test_compact_executor_never_loses_gradients():
    _, _, model = _sparse(executor="compact")
    with torch.no_grad():
        model(IDS, domain="code")
    compact = _gradients(model, domain="code")
    model.set_executor("masked")
    for key, gradient in _gradients(model, domain="code").items():
        assert torch.equal(compact[key], gradient)


def test_copies_follow_the_weights():
    _, _, model = _sparse(executor="compact")
    with torch.no_grad():
        before = model(IDS, domain="code").logits
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
        after = model(IDS, domain="code").logits
        model.set_executor("masked")
        assert torch.allclose(model(IDS, domain="code").logits, after, atol=1e-4)
        assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.parametrize("change", ["half", "bfloat16", "float64"])
@torch.no_grad()
def test_copies_follow_a_change_of_dtype(change):
    _, _, model = _sparse(executor="compact")
    model(IDS, domain="code")
    if change == "half":
        model.half()
    else:
        model.to(getattr(torch, change))
    compact = model(IDS, domain="code").logits
    model.set_executor("masked")
    masked = model(IDS, domain="code").logits
    assert compact.dtype == masked.dtype
    scale = masked.abs().max().item()
    assert (compact - masked).abs().max().item() <= scale * (0.05 if change != "float64" else 1e-12)


@torch.no_grad()
def test_saving_while_compact_is_active_saves_the_full_weights(tmp_path):
    dense, _, model = _sparse(executor="compact")
    with model.pathway("code"):
        model(IDS)
        model.save_pretrained(tmp_path)
    plain = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path).to_dense()
    for name, value in dense.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


def test_inference_mode_then_training():
    _, _, model = _sparse(executor="compact")
    with torch.inference_mode():
        model(IDS, domain="code")
        model(IDS, domain=["code", "law"])
    assert _gradients(model, domain=["code", "law"])


def test_trainer_runs_and_changes_only_what_the_pathway_computes(tmp_path):
    _, masks, model = _sparse(default_domain="code")
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in prompt(8, 9, seed=3)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    after = model.state_dict()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    for layer, keep in enumerate(masks["code"]):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(after[name][:, ~keep], before[name][:, ~keep])
        assert not torch.equal(after[name][:, keep], before[name][:, keep])


TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "up": ["up_proj"],
    "down": ["down_proj"],
    "ffn": ["gate_proj", "up_proj", "down_proj"],
    "all": "all-linear",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_lora_is_exact(targets):
    _, masks, model = _sparse(executor="compact")
    with torch.no_grad():
        untouched = model(IDS, domain="code").logits
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        outputs = {d: adapted(IDS, domain=d).logits for d in ("code", None)}
        outputs["rows"] = adapted(IDS, domain=["law", "code"]).logits
        tokens = adapted.generate(input_ids=IDS, domain="code", do_sample=False, max_new_tokens=4)
        merged = adapted.merge_and_unload()
        assert isinstance(merged, sp.SparsePathwaysForCausalLM)
        plain = merged.to_dense()
        reference = zeroed(plain, masks["code"])
        assert torch.allclose(outputs["code"], reference(IDS).logits, atol=2e-5)
        assert torch.allclose(merged(IDS, domain="code").logits, outputs["code"], atol=2e-5)
        assert torch.allclose(outputs[None], plain(IDS).logits, atol=2e-5)
        law = zeroed(plain, masks["law"])
        assert torch.allclose(outputs["rows"][0], law(IDS).logits[0], atol=2e-5)
        expected = reference.generate(IDS, do_sample=False, max_new_tokens=4)
        assert torch.equal(tokens, expected)
        assert not torch.allclose(outputs["code"], untouched, atol=1e-2)


def test_lora_trains_under_a_pathway_with_checkpointing(tmp_path):
    _, _, model = _sparse(default_domain="law")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS["ffn"])
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    plain = _gradients(adapted)
    model.activation_checkpointing_enable()
    again = _gradients(adapted)
    assert plain.keys() == again.keys()
    assert all("lora" in name for name in plain)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)
    adapted.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(_sparse(default_domain="law")[2], tmp_path)
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        assert torch.allclose(reloaded.eval()(IDS).logits, expected, atol=1e-6)


def test_an_unloaded_adapter_leaves_no_trace():
    dense, _, model = _sparse(executor="compact")
    with torch.no_grad():
        before = model(IDS, domain="code").logits
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=TARGETS["ffn"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, config)
        adapted(IDS, domain="code")
        with pytest.raises(sp.PathwaysError, match="adapter"):
            model.to_dense()
        restored = adapted.unload()
        assert torch.equal(restored(IDS, domain="code").logits, before)
        assert torch.equal(restored(IDS).logits, dense(IDS).logits)
    hooks = [attached.block.outgoing._forward_pre_hooks for attached in model._attachment.blocks]
    assert not any(hooks)


def test_a_replaced_leaf_is_an_error_and_not_silently_dense():
    _, _, model = _sparse()
    model.model.layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False)
    with pytest.raises(sp.PathwaysError, match=r"layers\.1\.mlp\.down_proj was replaced"):
        model(IDS, domain="code")


def _compact_equals_masked(model):
    with torch.no_grad():
        compact = model(IDS, domain="code").logits
        model.set_executor("masked")
        masked = model(IDS, domain="code").logits
        model.set_executor("compact")
    return torch.allclose(compact, masked, atol=1e-4)


def _merge(model):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(model, config).merge_and_unload()


WRITES = {
    "merged adapter": _merge,
    "averaged": lambda model: [p.data.mul_(1.3) for p in model.parameters()],
    "copied": lambda model: [p.data.copy_(torch.randn_like(p)) for p in model.parameters()],
    "one leaf": lambda model: model.model.layers[2].mlp.up_proj.weight.data.neg_(),
}


@pytest.mark.parametrize("entry", ["forward", "generate", "scope"])
@pytest.mark.parametrize("write", WRITES)
def test_copies_follow_writes_past_the_version_counter(write, entry):
    _, _, model = _sparse(executor="compact")
    model.eval()
    with torch.no_grad():
        model(IDS, domain="code")
        WRITES[write](model)
        if entry == "forward":
            assert _compact_equals_masked(model)
            return
        if entry == "generate":
            arguments = {"do_sample": False, "max_new_tokens": 2, "output_logits": True}
            arguments |= {"return_dict_in_generate": True, "domain": "code"}
            found = torch.stack(model.generate(IDS, **arguments).logits)
            model.set_executor("masked")
            expected = torch.stack(model.generate(IDS, **arguments).logits)
        else:
            with model.pathway("code"):
                found = model(IDS).logits
                model.set_executor("masked")
                expected = model(IDS).logits
        assert torch.allclose(found, expected, atol=1e-3)


def test_copies_follow_the_weights_of_a_model_made_in_inference_mode():
    with torch.inference_mode():
        _, _, model = _sparse(executor="compact")
        model(IDS, domain="code")
        for parameter in model.parameters():
            parameter.mul_(1.3)
        assert _compact_equals_masked(model)


def test_pathways_can_be_measured_and_replaced_under_an_adapter():
    from tests.texts import documents, tiny_tokenizer

    _, masks, model = _sparse()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=TARGETS["ffn"], layers_to_transform=[1]
    )
    adapted = peft.get_peft_model(model, config)
    inner = adapted.get_base_model()
    report = sp.evaluate(inner, tiny_tokenizer(), {"code": documents("code")})
    assert report.rows
    inner.set_pathways(model.pathways.subset(["law"]))
    with torch.no_grad():
        law = zeroed(_sparse()[0], masks["law"])(IDS).logits
        assert torch.allclose(adapted(IDS, domain="law").logits, law, atol=1e-5)
    with pytest.raises(sp.PathwaysError, match="get_base_model"):
        sp.evaluate(adapted, tiny_tokenizer(), {"law": documents("law")})


def test_a_parametrised_leaf_is_masked_and_exact():
    _, masks, model = _sparse(executor="compact")
    down = model.model.layers[1].mlp.down_proj
    torch.nn.utils.parametrizations.weight_norm(down)
    with torch.no_grad():
        found = model(IDS, domain="code").logits
        assert torch.allclose(found, zeroed(_sparse()[0], masks["code"])(IDS).logits, atol=1e-4)


def test_overflow_of_a_removed_neuron_does_not_spread():
    _, masks, model = _sparse(executor="masked")
    with torch.no_grad():
        for attached, keep in zip(model._attachment.blocks, masks["code"], strict=True):
            attached.block.incoming[0].weight[~keep] = 1e30
            attached.block.incoming[1].weight[~keep] = 1e30
        assert model(IDS, domain="code").logits.isfinite().all()
