"""Streaming statistics equal those of dense passes, one document at a time, in float64."""

import copy
import os

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import collectors, profiling
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.statistics import TENSORS, BlockStatistics
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import draw_windows
from hf_sparse_pathways.errors import (
    MismatchError,
    PathwaysError,
    TextError,
    UnknownNameError,
    UnsupportedModelError,
)
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, random_masks, tiny_llama
from tests.discovery.profiles import random_profile, statistics_of
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Lengths differ, so that batches are padded; each document is one window at MAX_LENGTH.
TEXTS = {
    name: [text for words in (3, 9, 17, 24) for text in documents(name, 3, words)]
    for name in ("code", "law")
}
MAX_LENGTH = 64


def _take(model, texts=TEXTS, **options):
    return profile(model, TOKENIZER, texts, **{"max_length": MAX_LENGTH, **options})


@torch.no_grad()
def _activations(model, sequences):
    """Return each block's activations over single unpadded sequences, ``(tokens, d_ff)``."""
    seen = {block.name: [] for block in find_blocks(model)}
    handles = [
        block.outgoing.register_forward_pre_hook(
            lambda _, args, name=block.name: seen[name].append(args[0].flatten(0, -2).clone())
        )
        for block in find_blocks(model)
    ]
    for ids in sequences:
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen.values()]


def _oracle(model, texts):
    sequences = [TOKENIZER(text)["input_ids"] for text in texts]
    return [statistics_of(activation) for activation in _activations(model, sequences)]


def _assert_same(mine, theirs, rtol=1e-5, atol=1e-6):
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.tokens == other.tokens
        for name in TENSORS:
            left, right = getattr(one, name), getattr(other, name)
            assert left.dtype == torch.float64
            torch.testing.assert_close(left, right, rtol=rtol, atol=atol * one.tokens)
        assert torch.equal(one.positive, other.positive)


def _equal(mine, theirs):
    assert mine.base == theirs.base
    assert mine.domains == theirs.domains
    for domain in mine.domains:
        assert mine[domain].provenance == theirs[domain].provenance
        _assert_same(mine[domain].blocks, theirs[domain].blocks, rtol=0, atol=0)


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3", "opt", "qwen3_moe"])
def case(request):
    model = build(request.param)
    return model, {name: _oracle(model, texts) for name, texts in TEXTS.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_profile_equals_dense_passes_over_single_documents(case, batch_size):
    model, expected = case
    taken = _take(model, batch_size=batch_size)
    assert taken.domains == list(TEXTS)
    for domain in TEXTS:
        _assert_same(taken[domain].blocks, expected[domain])


def test_moments_are_the_definitions(case):
    model, expected = case
    for block in expected["code"]:
        assert block.tokens == sum(len(TOKENIZER(text)["input_ids"]) for text in TEXTS["code"])
    taken = _take(model)["code"].blocks[0]
    ids = [TOKENIZER(text)["input_ids"] for text in TEXTS["code"]]
    values = _activations(model, ids)[0].double()
    for name, oracle in (
        ("mean_abs", values.abs().mean(0)),
        ("mean", values.mean(0)),
        ("second_moment", values.pow(2).mean(0)),
        ("positive_fraction", (values > 0).double().mean(0)),
    ):
        torch.testing.assert_close(getattr(taken, name), oracle, rtol=1e-5, atol=1e-7)


def test_a_budget_profiles_the_drawn_windows_only():
    options = {"max_tokens": 101, "max_length": 7, "seed": 3}
    windows = draw_windows(read_documents(TEXTS["code"]), TOKENIZER, **options)
    taken = _take(tiny_llama(), {"code": TEXTS["code"]}, batch_size=4, **options)["code"]
    activations = _activations(tiny_llama(), [window.ids for window in windows])
    _assert_same(taken.blocks, [statistics_of(values) for values in activations])
    assert taken.tokens == taken.provenance["tokens"] == 101
    assert set(taken.provenance["digests"]) == {window.document.digest for window in windows}


@pytest.mark.parametrize("values", [1, 48 * 33, 48 * 40])
def test_sums_do_not_depend_on_the_chunks(monkeypatch, values):
    whole = _take(tiny_llama())
    monkeypatch.setattr(collectors, "_CHUNK_VALUES", values)
    cut = _take(tiny_llama())
    for domain in TEXTS:
        _assert_same(cut[domain].blocks, whole[domain].blocks)


def test_halves_merge_to_the_whole():
    model, texts = tiny_llama(), TEXTS["code"]
    whole = _take(model, {"code": texts})
    first, second = (_take(model, {"code": half}) for half in (texts[::2], texts[1::2]))
    merged = first.merged(second)
    _assert_same(merged["code"].blocks, whole["code"].blocks)
    assert merged["code"].provenance["digests"] == whole["code"].provenance["digests"]
    for name in ("tokens", "documents"):
        assert merged["code"].provenance[name] == whole["code"].provenance[name]
    assert first["code"].tokens + second["code"].tokens == whole["code"].tokens, "merging is pure"


def test_merging_and_pooling_are_sums():
    profiles = random_profile(tiny_llama(), ("code", "law", "medicine"))
    parts = [profiles[domain].blocks for domain in profiles.domains]
    for index, pooled in enumerate(profiles.pooled().blocks):
        blocks = [part[index] for part in parts]
        assert pooled.tokens == sum(block.tokens for block in blocks)
        for name in ("abs_sum", "sum", "square_sum", "positive"):
            total = torch.stack([getattr(block, name) for block in blocks]).sum(0)
            torch.testing.assert_close(getattr(pooled, name), total, rtol=1e-12, atol=1e-12)
        largest = torch.stack([block.abs_max for block in blocks]).amax(0)
        assert torch.equal(pooled.abs_max, largest)
    other = random_profile(tiny_llama(), ("law", "finance"), seed=1)
    together = profiles.merged(other)
    assert together.domains == ["code", "law", "medicine", "finance"]
    assert together["law"].tokens == profiles["law"].tokens + other["law"].tokens
    assert together["finance"] is other["finance"]


def test_empty_statistics_are_the_neutral_element():
    block = random_profile(tiny_llama())["code"].blocks[0]
    empty = BlockStatistics.empty(len(block.sum))
    _assert_same([block.merged(empty), empty.merged(block)], [block, block], rtol=0, atol=0)


def test_profiles_of_different_models_do_not_merge():
    with pytest.raises(MismatchError, match=r"\(llama with .*\(gpt2 with"):
        random_profile(tiny_llama()).merged(random_profile(build("gpt2")))


def test_an_unknown_domain_is_refused_with_a_hint():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'code'\?"):
        random_profile(tiny_llama())["cod"]


def test_saved_and_loaded_is_equal_and_byte_stable(tmp_path):
    taken = _take(tiny_llama())
    for name in ("one", "two"):
        taken.save_pretrained(tmp_path / name)
    _equal(Profile.from_pretrained(tmp_path / "one"), taken)
    for name in ("profile.json", "profile.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    names = ["grams", "profile.json", "profile.safetensors"]
    assert sorted(os.listdir(tmp_path / "one")) == names
    assert os.listdir(tmp_path / "one" / "grams") == os.listdir(tmp_path / "two" / "grams")


def test_a_profile_of_a_file_with_any_name_can_be_saved(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("\n".join(TEXTS["code"]))
    taken = _take(tiny_llama(), {"code": path})
    taken.save_pretrained(tmp_path / "out")
    loaded = Profile.from_pretrained(tmp_path / "out")
    assert loaded["code"].provenance["source"].endswith(".txt")


def test_the_provenance_says_what_was_read(tmp_path):
    path = tmp_path / "code.txt"
    path.write_text(" ".join(TEXTS["code"]))
    provenance = _take(tiny_llama(), {"code": path}, seed=5)["code"].provenance
    assert provenance == {
        "source": str(path),
        "datasets": [],
        "documents": 1,
        "tokens": len(TOKENIZER(path.read_text())["input_ids"]),
        "max_length": MAX_LENGTH,
        "seed": 5,
        "digests": [read_documents(path).items[0].digest],
        "cut_digests": [],
        "validation_digests": [],
        "validation_cut_digests": [],
        "router_digests": [],
        "router_cut_digests": [],
    }


@pytest.mark.parametrize(
    "texts", [{"code": "too little text"}, {"code": TEXTS["code"], "law": "x"}]
)
def test_too_little_text_is_refused_with_its_count(texts):
    with pytest.raises(TextError, match=rf"at least {profiling.MIN_TOKENS}"):
        _take(tiny_llama(), texts)


def test_the_least_text_is_enough():
    text = " ".join(["the"] * profiling.MIN_TOKENS)
    assert _take(tiny_llama(), {"code": text})["code"].tokens == profiling.MIN_TOKENS
    with pytest.raises(TextError):
        _take(tiny_llama(), {"code": text.removesuffix(" the")})


def test_that_a_text_is_short_is_said(caplog):
    taken = _take(tiny_llama(), {"code": documents("code", 40, 30)}, max_tokens=1023, grams=False)
    assert taken["code"].provenance["tokens"] == 1023
    assert "'code' has only 1023 tokens of calibration text" in caplog.text
    assert "max_tokens (--max-tokens)" in caplog.text
    caplog.clear()
    _take(tiny_llama(), {"code": documents("code", 40, 30)}, max_tokens=1024, grams=False)
    assert caplog.text == ""


def test_windows_of_one_token_are_refused():
    with pytest.raises(PathwaysError, match=r"max_length \(--max-length\) has to be at least 2"):
        _take(tiny_llama(), max_length=1)


def test_no_domains_are_refused():
    with pytest.raises(TextError, match="No domains"):
        _take(tiny_llama(), {})


@pytest.mark.parametrize("name", ["max_tokens", "max_length", "batch_size"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(PathwaysError, match=name):
        _take(tiny_llama(), **{name: 0})


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UnsupportedModelError):
        _take(torch.nn.Sequential(torch.nn.Linear(3, 3)))


def _state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (module.training, type(module), *(list(getattr(module, name)) for name in hooks))
        for module in model.modules()
    ]


def _interrupted(model):
    def fail(*_):
        raise RuntimeError("in the middle")

    handle = find_blocks(model)[1].outgoing.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        _take(model)
    handle.remove()


@pytest.mark.parametrize("run", [_take, _interrupted], ids=["profiled", "interrupted"])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_the_model_is_left_as_it_was(run, mode):
    model = build("gpt2").train(mode != "eval")
    if mode == "mixed":
        model.transformer.h[1].eval()
    weights = copy.deepcopy(model.state_dict())
    find_blocks(model)[0].outgoing.register_forward_hook(lambda *_: None)
    before = _state(model)
    run(model)
    assert _state(model) == before
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_profiling():
    model = build("gpt2").train()
    _equal(_take(model), _take(build("gpt2").eval()))


@pytest.mark.parametrize("executor", ["masked", "compact"])
@pytest.mark.parametrize("ambient", ["code", None, "rows"])
def test_a_model_with_pathways_is_profiled_densely(executor, ambient):
    dense = build("llama")
    model = sp.SparsePathwaysForCausalLM.from_dense(
        dense,
        sp.Pathways.from_masks(dense, random_masks(dense)),
        executor=executor,
        default_domain="law",
    )
    expected = _take(dense)
    with model.pathway(["code", "law"] if ambient == "rows" else ambient):
        inside = _take(model)
    _equal(inside, expected)
    _equal(_take(model), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_an_error_that_names_the_domain_and_block(value):
    model = build("llama")
    find_blocks(model)[1].incoming[0].weight.data[3] = value
    with pytest.raises(PathwaysError, match=r"'code'.*layers\.1\..*NaN"):
        _take(model)


def test_a_window_beyond_the_positions_is_a_clear_error():
    long = " ".join(TEXTS["code"] * 3)
    with pytest.raises(PathwaysError, match="128"):
        _take(build("gpt2"), {"code": long}, max_length=400)


def test_bfloat16_models_are_summed_in_full_precision():
    model = build("llama").bfloat16()
    expected = _oracle(model, TEXTS["code"])
    taken = _take(model, {"code": TEXTS["code"]}, batch_size=1)["code"]
    _assert_same(taken.blocks, expected)


def _profiled(texts, seed=0):
    return profile(tiny_llama(), tiny_tokenizer(), {"code": texts}, max_tokens=300, seed=seed)


@pytest.mark.parametrize("stored", [False, True])
def test_what_one_part_was_calibrated_on_validates_no_other(stored, tmp_path):
    texts = documents("code", count=40)
    parts = [_profiled(texts, seed) for seed in (0, 1)]
    if stored:
        for part, name in zip(parts, "ab", strict=True):
            part.save_pretrained(tmp_path / name)
        parts = [Profile.from_pretrained(tmp_path / name) for name in "ab"]
    merged = parts[0].merged(parts[1])["code"]
    calibrated = {*merged.provenance["digests"]}
    shared = [calibrated & {*part["code"].provenance["validation_digests"]} for part in parts]
    assert all(shared), "the test needs parts that overlap"
    if stored:
        assert merged.validation == ()
    else:
        assert merged.validation
        assert all(w.document.digest not in calibrated for w in merged.validation)


def test_parts_of_other_text_keep_their_validation():
    texts = documents("code", count=80)
    parts = [_profiled(half) for half in (texts[:40], texts[40:])]
    merged = parts[0].merged(parts[1])["code"]
    assert merged.validation == parts[0]["code"].validation + parts[1]["code"].validation != ()


def test_the_same_text_is_not_merged_twice():
    part = _profiled(documents("code", count=40))
    with pytest.raises(PathwaysError, match="would count twice"):
        part.merged(part)
