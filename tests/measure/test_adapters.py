"""Under an adapter, dense is the base without it, and pathways are measured with it."""

import peft
import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.measure.adapters import active_adapters, without_adapters
from hf_sparse_pathways.measure.quality import evaluate
from tests.architectures import build, random_masks, zeroed
from tests.measure.test_quality import TEXTS, TOKENIZER, _naive

TARGETS = {"attention": ["q_proj", "v_proj"], "ffn": ["gate_proj", "up_proj", "down_proj"]}


def _evaluate(model, **options):
    given = {"controls": False, "max_length": 64, **options}
    return evaluate(model, TOKENIZER, {"code": TEXTS["code"]}, **given)


def _adapted(targets="ffn", **options):
    dense = build("llama")
    masks = random_masks(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    torch.manual_seed(1)
    settings = {"r": 4, "init_lora_weights": False, **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS[targets], **settings)
    return masks, peft.get_peft_model(model, config)


def _state(model):
    return (
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [getattr(module, "disable_adapters", None) is True for module in model.modules()],
        [list(getattr(module, "merged_adapters", ())) for module in model.modules()],
        [module.training for module in model.modules()],
    )


@pytest.mark.parametrize("targets", TARGETS)
def test_dense_is_the_base_and_pathways_have_the_adapter(targets):
    masks, adapted = _adapted(targets)
    report = _evaluate(adapted.get_base_model())
    dense, pathway = report.rows
    untouched, _ = _naive(build("llama"), TEXTS["code"])
    assert dense.perplexity == pytest.approx(untouched, rel=1e-5)
    merged = adapted.merge_and_unload().to_dense()
    assert _naive(merged, TEXTS["code"])[0] != pytest.approx(untouched, rel=1e-2)
    expected, _ = _naive(zeroed(merged, masks["code"]), TEXTS["code"])
    assert pathway.perplexity == pytest.approx(expected, rel=1e-4)
    assert pathway.ratio == pytest.approx(expected / untouched, rel=1e-4)
    assert "dense is without the adapter 'default'" in report.caption("code")
    assert report.settings.adapters == ("default",)


def test_without_an_adapter_nothing_is_said_of_any():
    adapted = _adapted()[1]
    model = adapted.get_base_model()
    model.set_executor("masked")  # as wrapped leaves are
    with adapted.disable_adapter():
        off = _evaluate(model)
    plain = _evaluate(adapted.unload())
    assert off == plain
    for report in (off, plain):
        assert report.settings.adapters == ()
        assert "adapter" not in str(report)
    merged = _evaluate(_adapted()[1].merge_and_unload())
    assert merged.settings.adapters == ()
    assert merged.rows[0].perplexity != pytest.approx(plain.rows[0].perplexity, rel=1e-2)


def _fail(*_):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_the_adapter_is_left_as_it_was(frozen, broken):
    adapted = _adapted(modules_to_save=["lm_head"])[1]
    if frozen:
        for parameter in adapted.parameters():
            parameter.requires_grad_(False)
    before = _state(adapted)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = adapted(ids, domain="code").logits
    if broken:
        handle = adapted.get_base_model().model.norm.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            _evaluate(adapted.get_base_model())
        handle.remove()
    else:
        _evaluate(adapted.get_base_model())
    assert _state(adapted) == before
    with torch.no_grad():
        assert torch.equal(adapted(ids, domain="code").logits, logits)


def test_modules_that_were_trained_whole_are_switched_off_too():
    adapted = _adapted(modules_to_save=["lm_head"])[1]
    model = adapted.get_base_model()
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(-1.0)
    untouched, _ = _naive(build("llama"), TEXTS["code"])
    assert _evaluate(model).rows[0].perplexity == pytest.approx(untouched, rel=1e-5)


@torch.no_grad()
def test_only_what_was_on_is_switched_on_again():
    adapted = _adapted()[1]
    off = adapted.get_base_model().model.layers[0].mlp.up_proj
    off.enable_adapters(False)
    before = _state(adapted)
    assert active_adapters(adapted) == ("default",)
    with without_adapters(adapted):
        assert active_adapters(adapted) == ()
    assert _state(adapted) == before
    assert off.disable_adapters


@pytest.mark.parametrize(
    ("prepare", "options", "hint"),
    [
        (lambda adapted: adapted.merge_adapter(), {}, "unmerge_adapter"),
        (lambda adapted: adapted.train(), {"bias": "all"}, "biases of the base"),
    ],
    ids=["merged", "biases"],
)
def test_where_the_base_is_gone_nothing_is_called_dense(prepare, options, hint):
    adapted = _adapted(**options)[1]
    prepare(adapted)
    before = _state(adapted)
    with pytest.raises(UnsupportedModelError, match=hint):
        _evaluate(adapted.get_base_model())
    assert _state(adapted) == before


def test_domains_with_adapters_of_their_own_are_measured_with_them(tmp_path):
    masks, adapted = _adapted("attention")
    adapted.save_pretrained(tmp_path)
    model = adapted.unload()
    model.attach_adapters({"code": tmp_path})
    report = _evaluate(model)
    dense, pathway = report.rows
    assert dense.perplexity == pytest.approx(_naive(build("llama"), TEXTS["code"])[0], rel=1e-5)
    model.detach_adapters()
    merged = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload().to_dense()
    expected, _ = _naive(zeroed(merged, masks["code"]), TEXTS["code"])
    assert pathway.perplexity == pytest.approx(expected, rel=1e-4)
    assert "'pathway-code'" in report.caption("code")
