"""Groups of blocks give the matrices of one pass, and an interrupted pass goes on."""

import copy
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse_pathways.discovery import profiling, resumption
from hf_sparse_pathways.discovery.background import BATCH, ROWS, TOKENS
from hf_sparse_pathways.discovery.expert_statistics import TENSORS as EXPERT_TENSORS
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import group_blocks, profile
from hf_sparse_pathways.discovery.statistics import TENSORS
from hf_sparse_pathways.errors import ArtefactError, PathwaysError
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, tiny_llama
from tests.moe.architectures import build_moe
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = {name: [*documents(name, 5, 17), *documents(name, 3, 8)] for name in ("code", "law")}
BATCHES = 4  # of each domain
WRITING = ROWS // BATCH * (TOKENS - 1)  # passes in which the model writes by itself
ONE_BLOCK = 4 * (48 + 32 + 1) ** 2  # bytes of a tiny Llama's matrix


def _memory(blocks):
    """Return the bytes in which so many blocks fit, and the copy of one that is being stored."""
    return (blocks + 1) * ONE_BLOCK


def _take(model, texts=TEXTS, **options):
    options = {"max_length": 32, "batch_size": 2, "validation_tokens": 0, **options}
    return profile(model, TOKENIZER, texts, **options)


def _assert_equal(mine, theirs):
    assert mine.domains == theirs.domains
    for domain in mine.domains:
        for one, other in zip(mine[domain].blocks, theirs[domain].blocks, strict=True):
            assert one.tokens == other.tokens
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)
        for one, other in zip(mine[domain].grams, theirs[domain].grams, strict=True):
            assert one.load().d_ff == other.load().d_ff
            assert torch.equal(one.load().total, other.load().total)


def _differs(mine, theirs):
    pairs = zip(mine["code"].grams, theirs["code"].grams, strict=True)
    return any(not torch.equal(one.load().total, other.load().total) for one, other in pairs)


class _Interrupt:
    """Counts a model's forward passes, and interrupts one of them."""

    def __init__(self, model, at=None):
        self.passes, self.at = 0, at
        self.handle = model.get_input_embeddings().register_forward_hook(self._see)

    def _see(self, *_):
        self.passes += 1
        if self.passes == self.at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _store_after_each_batch(monkeypatch):
    monkeypatch.setattr(resumption, "STORE_SECONDS", -1.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "deepseek_v3", "qwen3_moe"])
def test_groups_give_what_one_pass_gives(architecture, tmp_path):
    model = build(architecture)
    whole = _take(model)
    largest = max(4 * (block.d_ff + block.d_in + 1) ** 2 for block in find_blocks(model))
    single = _take(model, max_memory=2 * largest, work_folder=tmp_path)
    _assert_equal(single, whole)
    _assert_equal(_take(model, max_memory=f"{3 * largest}", work_folder=tmp_path), whole)


def test_a_pass_ends_at_its_groups_last_block(tmp_path):
    model, seen = build("llama"), [0, 0, 0]
    for index, block in enumerate(find_blocks(model)):

        def count(*_, index=index):
            seen[index] += 1

        block.layer.register_forward_pre_hook(count)
    _take(model, {"code": TEXTS["code"]}, max_memory=_memory(1), work_folder=tmp_path)
    assert [passes - WRITING for passes in seen] == [3 * BATCHES, 2 * BATCHES, BATCHES]


@pytest.mark.parametrize(
    ("sizes", "groups"), [(1, [1, 1, 1]), (1.9, [1, 1, 1]), (2, [2, 1]), (3, [3]), (99, [3])]
)
def test_groups_are_as_large_as_the_memory_allows(sizes, groups):
    blocks = find_blocks(tiny_llama())
    cut = group_blocks(blocks, int(_memory(sizes)), 0)
    assert [len(group) for group in cut] == groups
    assert [block for group in cut for block in group] == list(blocks)


WAYS_OUT = r"raise max_memory \(--max-memory\), or take the profile with grams=False \(--no-grams\)"


def test_too_little_memory_is_refused_with_both_numbers_and_the_ways_out(tmp_path):
    for texts in ({"code": TEXTS["code"]}, TEXTS):
        needed = len(texts) * 3 * ONE_BLOCK
        with pytest.raises(PathwaysError, match=rf"max_memory.*{WAYS_OUT}, or pass work_folder="):
            _take(tiny_llama(), texts, max_memory=needed - 1)
        _take(tiny_llama(), texts, max_memory=needed)
    with pytest.raises(PathwaysError, match=rf"{WAYS_OUT}\.$"):
        _take(tiny_llama(), max_memory=_memory(1) - 1, work_folder=tmp_path)
    _take(tiny_llama(), max_memory=1, grams=False)


def test_the_error_about_memory_shows_small_sizes_as_they_are():
    with pytest.raises(PathwaysError) as caught:
        _take(tiny_llama(), max_memory=5000)
    assert "0.00 GB" not in str(caught.value)


@pytest.mark.parametrize(
    "size", ["", "x", "-1GB", "0", 0, -5, "4 GBB", None, "nan", True], ids=repr
)
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(PathwaysError, match="no size of memory"):
        _take(tiny_llama(), max_memory=size)


@pytest.mark.parametrize(
    ("blocks", "at"), [(3, 1), (3, 3), (3, 4), (3, 5), (3, 8), (1, 2), (1, 6), (1, 13), (1, 24)]
)
def test_an_interrupted_run_goes_on_where_it_was(blocks, at, tmp_path):
    model, options = build("llama"), {"max_memory": _memory(blocks), "work_folder": tmp_path}
    passes = 2 * BATCHES * 3 // blocks
    whole = _take(tiny_llama())
    interrupt = _Interrupt(model, at)
    with pytest.raises(KeyboardInterrupt):
        _take(model, **options)
    interrupt.handle.remove()
    after = _Interrupt(model)
    _assert_equal(_take(model, **options), whole)
    assert after.passes == passes - (at - 1) + WRITING
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_finished_run_is_read_without_any_pass(tmp_path):
    model = build("llama")
    first = _take(model, work_folder=tmp_path)
    after = _Interrupt(model)
    _assert_equal(_take(model, work_folder=tmp_path), first)
    assert after.passes == 0


def test_what_the_model_writes_is_stored_too(tmp_path):
    model = build("llama")
    first = _take(model, work_folder=tmp_path)
    again = _take(model, work_folder=tmp_path, max_length=9)
    other = _take(model, work_folder=tmp_path, seed=1)
    for name, part in first.background.parts().items():
        assert torch.equal(again.background.parts()[name], part)
    assert not torch.equal(other.background.samples, first.background.samples)
    paths = [*tmp_path.glob("background-*")]
    assert len(paths) == 2
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="Delete it to begin anew"):
        _take(model, work_folder=tmp_path)


def _with_changed(name):
    def change(model):
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            parameters[name].mul_(1.5)

    return change


CHANGES = {
    "outgoing weight": _with_changed("model.layers.1.mlp.down_proj.weight"),
    "incoming weight": _with_changed("model.layers.1.mlp.gate_proj.weight"),
    "attention weight": _with_changed("model.layers.0.self_attn.v_proj.weight"),
    "norm": _with_changed("model.layers.2.post_attention_layernorm.weight"),
    "embeddings": _with_changed("model.embed_tokens.weight"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_weights_do_not_pick_old_sums_up(kind, tmp_path):
    model = build("llama")
    old = _take(model, work_folder=tmp_path)
    CHANGES[kind](model)
    new = _take(model, work_folder=tmp_path)
    assert _differs(new, old)
    _assert_equal(new, _take(model))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1, "max_tokens": 60},
        {"max_tokens": 60},
        {"max_length": 9},
        {"batch_size": 3},
        {"max_memory": _memory(1)},
        {"texts": {"code": TEXTS["law"]}},
        {"grams": False},
    ],
    ids=str,
)
def test_other_settings_do_not_pick_old_sums_up(options, tmp_path):
    _take(tiny_llama(), work_folder=tmp_path)
    taken = _take(tiny_llama(), work_folder=tmp_path, **options)
    options = {name: value for name, value in options.items() if name != "max_memory"}
    _assert_equal(taken, _take(tiny_llama(), **options))


def test_another_dtype_does_not_pick_old_sums_up(tmp_path):
    model = build("llama")
    _take(model, work_folder=tmp_path)
    half = copy.deepcopy(model).bfloat16()
    _assert_equal(_take(half, work_folder=tmp_path), _take(half))
    _assert_equal(
        _take(model, work_folder=tmp_path, precision="bfloat16"), _take(model, precision="bfloat16")
    )


@pytest.mark.parametrize("at", [1, 2, 3, 5, 11, 12, 13])
def test_a_run_that_is_stopped_while_it_stores_goes_on_to_the_same(at, tmp_path, monkeypatch):
    model, stored = build("llama"), []

    def stop(*args, **kwargs):
        stored.append(args)
        if len(stored) == at:
            raise KeyboardInterrupt
        save_file(*args, **kwargs)

    monkeypatch.setattr(resumption, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        _take(model, work_folder=tmp_path)
    monkeypatch.setattr(resumption, "save_file", save_file)
    after = _Interrupt(model)
    _assert_equal(_take(model, work_folder=tmp_path), _take(tiny_llama()))
    assert after.passes <= 2 * BATCHES + WRITING


def _stored(change=lambda tensors: tensors, batches="2"):
    """Store a block's sums, changed, in place of those that are there."""

    def damage(path):
        save_file(change(load_file(path)), path, metadata={"batches": batches})

    return damage


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 500),
    "cut": lambda path: os.truncate(path, 900),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "no batches": lambda path: save_file(load_file(path), path),
    **{f"{text!r} batches": _stored(batches=text) for text in ("-1", "x", "²", "9" * 5000, "")},
    "a sum less": _stored(lambda t: {k: v for k, v in t.items() if k != "upper"}),
    "a sum more": _stored(lambda t: {**t, "more": t["upper"].clone()}),
    "narrower": _stored(lambda t: {**t, "upper": t["upper"][:1].clone()}),
    "another dtype": _stored(lambda t: {**t, "sum": t["sum"].float()}),
    "several counts": _stored(lambda t: {**t, "tokens": t["tokens"].repeat(2)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sums_are_refused_by_name(damage, tmp_path):
    model = build("llama")
    interrupt = _Interrupt(model, 3)
    with pytest.raises(KeyboardInterrupt):
        _take(model, work_folder=tmp_path)
    interrupt.handle.remove()
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    DAMAGE[damage](path)
    if damage == "a pipe":  # as if nothing was stored
        _assert_equal(_take(model, work_folder=tmp_path), _take(tiny_llama()))
        return
    with pytest.raises(ArtefactError, match=rf"{path.name}.*Delete it"):
        _take(model, work_folder=tmp_path)


@pytest.mark.parametrize("upper", [None, torch.zeros(3), torch.zeros(9, 9), torch.zeros(60, 50)])
def test_a_stored_matrix_of_another_shape_is_refused(upper, tmp_path):
    taken = _take(build("llama"), work_folder=tmp_path)
    path = taken["code"].grams[0].path
    rest = {name: tensor for name, tensor in load_file(path).items() if name != "upper"}
    save_file(rest if upper is None else {**rest, "upper": upper}, path)
    with pytest.raises(ArtefactError, match=path.name):
        taken["code"].grams[0].load()


def test_nothing_is_half_written(tmp_path):
    model = build("llama")
    interrupt = _Interrupt(model, 4)
    with pytest.raises(KeyboardInterrupt):
        _take(model, work_folder=tmp_path)
    interrupt.handle.remove()
    names = [name for _, _, files in os.walk(tmp_path) for name in files]
    assert names
    assert not any(name.endswith(".partial") for name in names)


def test_a_profile_from_a_work_folder_is_copied_when_it_is_saved(tmp_path):
    taken = _take(tiny_llama(), work_folder=tmp_path / "work")
    taken.save_pretrained(tmp_path / "profile")
    shutil.rmtree(tmp_path / "work")
    _assert_equal(Profile.from_pretrained(tmp_path / "profile"), _take(tiny_llama()))
    with pytest.raises(ArtefactError, match=r"missing|cannot be read"):
        taken["code"].grams[0].load()


def test_the_defaults_suffice_for_small_models():
    assert profiling.MAX_MEMORY == "4GB"
    assert _take(tiny_llama())["law"].grams


def _taken_experts(taken):
    return [layer for domain in taken.domains for layer in taken[domain].experts]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_mixed"])
def test_an_interrupted_pass_over_routed_experts_goes_on_where_it_was(name, tmp_path):
    texts, options = {"code": TEXTS["code"]}, {"grams": False, "work_folder": tmp_path}
    model = build_moe(name)
    whole = _take(build_moe(name), texts, grams=False)
    ffn = BATCHES if find_blocks(model) else 0
    interrupt = _Interrupt(model, ffn + 3)
    with pytest.raises(KeyboardInterrupt):
        _take(model, texts, **options)
    interrupt.handle.remove()
    after = _Interrupt(model)
    again = _take(model, texts, **options)
    assert after.passes == BATCHES - 2 + WRITING
    for mine, theirs in zip(_taken_experts(again), _taken_experts(whole), strict=True):
        assert mine.tokens == theirs.tokens > 0
        for part in EXPERT_TENSORS:
            assert torch.equal(getattr(mine, part), getattr(theirs, part))
    assert not any(module._forward_pre_hooks for module in model.modules())
    after.passes = 0
    _take(model, texts, **options)
    assert after.passes == 0
