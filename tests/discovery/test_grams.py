"""Gram matrices equal those of two passes in float64, however they are added up."""

import copy

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import collectors
from hf_sparse_pathways.discovery.grams import Gram, GramAccumulator, SumOfGrams, merge_grams
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, random_masks, tiny_llama
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [text for words in (3, 9, 17, 24) for text in documents("code", 2, words)]


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _oracle(activation, block_input, weights=None):
    """Return the sum over tokens of z z^T, token by token in float64."""
    total = torch.zeros((activation.shape[1] + block_input.shape[1] + 1,) * 2).double()
    for index in range(len(activation)):
        one = torch.ones(1).double()
        z = torch.cat([activation[index].double(), block_input[index].double(), one])
        if weights is not None:
            z = z * weights[index].double()
        total += torch.outer(z, z)
    return total


def _close(mine, theirs, rtol=1e-5, atol=1e-6):
    """Compare matrices relative to their largest entry."""
    scale = theirs.double().abs().max()
    torch.testing.assert_close(mine.double() / scale, theirs.double() / scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize(("d_ff", "d_in"), [(1, 1), (2, 1), (5, 3), (48, 32), (37, 11)])
def test_sums_are_those_of_single_tokens(d_ff, d_in, rows):
    activation, block_input = _draw(83, d_ff), _draw(83, d_in, seed=1)
    accumulator = GramAccumulator(d_in, d_ff)
    workspace = torch.full((rows, d_ff + d_in + 6), float("nan"))
    for part in (slice(0, 50), slice(50, 51), slice(51, 83)):
        accumulator.add(activation[part], block_input[part], workspace)
    gram = accumulator.gram()
    _close(gram.total, _oracle(activation, block_input))
    assert torch.equal(gram.total, gram.total.T)
    assert gram.total.dtype == torch.float32
    assert gram.tokens == 83


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [3, 100])
def test_targets_and_weights_are_those_of_single_tokens(rows, weighted):
    activation, block_input, target = _draw(41, 9), _draw(41, 4, seed=1), _draw(41, 6, seed=2)
    weights = _draw(41, 1, seed=3).abs() if weighted else None
    accumulator = GramAccumulator(4, 9, targets=6)
    for part in (slice(0, 20), slice(20, 41)):
        own = None if weights is None else weights[part]
        parts = (activation[part], block_input[part], torch.empty(rows, 14))
        accumulator.add(*parts, target=target[part], weights=own)
    _close(accumulator.gram().total, _oracle(activation, block_input, weights))
    squares = torch.ones(41).double() if weights is None else weights[:, 0].double() ** 2
    z = torch.cat([activation, block_input, torch.ones(41, 1)], 1).double()
    cross = sum(squares[i] * torch.outer(target[i].double(), z[i]) for i in range(41))
    _close(accumulator.cross, cross)
    assert accumulator.gram().tokens == pytest.approx(float(squares.sum()))


def test_many_tokens_of_a_large_mean_stay_exact():
    activation = _draw(20_000, 64) + 30  # tiny products are added up one by one on some processors
    accumulator = GramAccumulator(2, 64)
    accumulator.add(activation, activation[:, :2], torch.empty(2048, 67))
    z = torch.cat([activation, activation[:, :2], torch.ones(20_000, 1)], 1).double()
    _close(accumulator.gram().total, z.T @ z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_added_in_float32(dtype):
    activation, block_input = _draw(50, 6).to(dtype), _draw(50, 3, seed=1).to(dtype)
    accumulator = GramAccumulator(3, 6)
    accumulator.add(activation, block_input, torch.empty(16, 10))
    _close(accumulator.gram().total, _oracle(activation, block_input))


@pytest.mark.parametrize("d_in", [0, 130])
def test_products_of_bfloat16_activations_lose_nothing(d_in):
    activation = _draw(700, 260).bfloat16()
    block_input = _draw(700, d_in, seed=1).bfloat16() if d_in else None
    accumulator = GramAccumulator(d_in, 260, targets=140)
    target = _draw(700, 140, seed=2).bfloat16()
    accumulator.add(activation, block_input, torch.empty(512, 400), target=target)
    inputs = torch.empty(700, 0) if block_input is None else block_input
    z = torch.cat([activation.double(), inputs.double(), torch.ones(700, 1)], 1)
    _close(accumulator.gram().total, z.T @ z)
    _close(accumulator.cross, target.double().T @ z)
    assert accumulator.gram().tokens == 700


def test_weights_and_targets_beside_bfloat16_activations_are_rounded_at_most():
    activation, target = _draw(700, 260).bfloat16(), _draw(700, 140, seed=2)
    weights = _draw(700, 1, seed=3).abs()
    accumulator = GramAccumulator(0, 260, targets=140)
    accumulator.add(activation, None, torch.empty(512, 300), target=target, weights=weights)
    z = torch.cat([activation.double(), torch.ones(700, 1)], 1) * weights
    _close(accumulator.gram().total, z.T @ z, rtol=1e-2, atol=1e-3)
    _close(accumulator.cross, (target.double() * weights).T @ z, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("d_in", [0, 37])
def test_unmixed_the_activation_and_the_rest_stand_alone(d_in):
    activation, inputs = _draw(700, 261), _draw(700, d_in, seed=1)
    accumulator = GramAccumulator(d_in, 261, mixed=False)
    accumulator.add(activation, inputs, torch.empty(512, 300))
    rest = torch.cat([inputs.double(), torch.ones(700, 1)], 1)
    expected = torch.block_diag(activation.double().T @ activation.double(), rest.T @ rest)
    _close(accumulator.gram().total, expected)


def test_merging_adds_without_changing_either():
    grams = [Gram(_oracle(_draw(9, 3, seed=s), _draw(9, 2, seed=s)).float(), 3) for s in range(4)]
    copies = [gram.total.clone() for gram in grams]
    merged = merge_grams(merge_grams(grams[:2], grams[2:]), grams[:2])
    assert torch.equal(merged[0].load().total, copies[0] + copies[2] + copies[0])
    assert torch.equal(merged[1].load().total, copies[1] + copies[3] + copies[1])
    assert SumOfGrams((grams[0],)).load() is grams[0]
    assert all(torch.equal(gram.total, c) for gram, c in zip(grams, copies, strict=True))


@torch.no_grad()
def _seen(model, texts):
    """Return each block's activations and inputs over single unpadded texts."""
    seen = [([], []) for _ in find_blocks(model)]
    handles = []
    for block, (activations, inputs) in zip(find_blocks(model), seen, strict=True):
        for leaf, kept in ((block.outgoing, activations), (block.incoming[0], inputs)):
            hook = lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2).clone())  # noqa: E731
            handles.append(leaf.register_forward_pre_hook(hook))
    for text in texts:
        model(torch.tensor([TOKENIZER(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return [(torch.cat(activations), torch.cat(inputs)) for activations, inputs in seen]


ARCHITECTURES = [
    "llama",
    "gpt2_odd",
    "phi3",
    "gemma3",
    "gpt_neox",
    "falcon",
    "deepseek_v3",
    "opt",
    "bert",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_profiles_matrices_are_those_of_single_documents(architecture, batch_size):
    model = build(architecture)
    taken = profile(model, TOKENIZER, {"code": TEXTS}, max_length=64, batch_size=batch_size)
    expected = _seen(model, TEXTS)
    assert len(taken["code"].grams) == len(expected)
    for source, (activation, block_input) in zip(taken["code"].grams, expected, strict=True):
        gram = source.load()
        assert gram.tokens == taken["code"].tokens
        _close(gram.total, _oracle(activation, block_input), atol=1e-5)


def test_matrices_do_not_depend_on_the_working_space(monkeypatch):
    options = {"max_length": 64, "batch_size": 4}
    whole = profile(tiny_llama(), TOKENIZER, {"code": TEXTS}, **options)
    monkeypatch.setattr(collectors, "_MOST_SPACE", 1)
    cut = profile(tiny_llama(), TOKENIZER, {"code": TEXTS}, **options)
    for mine, theirs in zip(cut["code"].grams, whole["code"].grams, strict=True):
        _close(mine.load().total, theirs.load().total)


def test_matrices_agree_with_the_statistics():
    taken = profile(tiny_llama(), TOKENIZER, {"code": TEXTS}, max_length=64)["code"]
    for gram, block in zip((source.load() for source in taken.grams), taken.blocks, strict=True):
        torch.testing.assert_close(
            gram.total[: gram.d_ff, -1].double() / gram.tokens, block.mean, rtol=1e-4, atol=1e-6
        )
        diagonal = gram.total.diagonal()[: gram.d_ff].double() / gram.tokens
        torch.testing.assert_close(diagonal, block.second_moment, rtol=1e-4, atol=1e-6)


def test_matrices_of_halves_merge_to_those_of_the_whole():
    options = {"max_length": 64, "batch_size": 1}
    whole = profile(tiny_llama(), TOKENIZER, {"code": TEXTS}, **options)
    halves = [
        profile(tiny_llama(), TOKENIZER, {"code": half}, **options)
        for half in (TEXTS[::2], TEXTS[1::2])
    ]
    merged = halves[0].merged(halves[1])["code"]
    for mine, theirs in zip(merged.grams, whole["code"].grams, strict=True):
        _close(mine.load().total, theirs.load().total)


def test_none_are_taken_unless_asked_for():
    taken = profile(tiny_llama(), TOKENIZER, {"code": TEXTS}, max_length=64, grams=False)
    assert taken["code"].grams == ()
    other = profile(tiny_llama(), TOKENIZER, {"code": TEXTS[1:]}, max_length=64)
    assert taken.merged(other)["code"].grams == ()


@pytest.mark.parametrize("first", [True, False])
def test_matrices_with_and_without_inputs_merge_to_those_without(first, tmp_path):
    parts = [
        profile(tiny_llama(), TOKENIZER, {"code": texts}, max_length=64, inputs=inputs)
        for texts, inputs in ((TEXTS, first), (documents("code", 9, 12, seed=4), not first))
    ]
    both = [*TEXTS, *documents("code", 9, 12, seed=4)]
    whole = profile(tiny_llama(), TOKENIZER, {"code": both}, max_length=64, inputs=False)
    merged = parts[0].merged(parts[1])
    merged.save_pretrained(tmp_path)
    for mine, theirs in zip(merged["code"].grams, whole["code"].grams, strict=True):
        _close(mine.load().total, theirs.load().total)
    three = merged.merged(parts[0])["code"].grams[0].load()
    assert not three.has_input
    assert three.tokens == merged["code"].tokens + parts[0]["code"].tokens


def test_a_saved_profiles_files_have_the_usual_mode(tmp_path):
    taken = profile(tiny_llama(), TOKENIZER, {"code": TEXTS}, max_length=64)
    taken.save_pretrained(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1
    (tmp_path / "other").touch()
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}


def test_a_model_with_pathways_gives_its_dense_matrices():
    dense = build("gpt2")
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    sparse = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, default_domain="law")
    taken = [
        profile(model, TOKENIZER, {"code": TEXTS}, max_length=64)["code"].grams
        for model in (dense, sparse, copy.deepcopy(sparse))
    ]
    for first, *others in zip(*taken, strict=True):
        assert all(torch.equal(other.load().total, first.load().total) for other in others)
