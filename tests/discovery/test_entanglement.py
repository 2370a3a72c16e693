"""Wasserstein distances to the normal distribution against scipy's, and against closed forms."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, wasserstein_distance

from hf_sparse_pathways.discovery import collection, resumption
from hf_sparse_pathways.discovery.entanglement import ProductCounts, ProductMoments
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, tiny_llama
from tests.pathways.corruption import change_tensors, read_meta
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = {name: [*documents(name, 5, 17), *documents(name, 3, 8)] for name in ("code", "law")}
NORMAL = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
CONSTANT = math.sqrt(2 / math.pi)
"""E|u| of a normal u: the distance of what never varies."""


pytestmark = pytest.mark.usefixtures("no_background")


def _take(model, **options):
    options = {
        "max_length": 32,
        "batch_size": 2,
        "validation_tokens": 0,
        "grams": False,
        "entanglement": True,
        **options,
    }
    return profile(model, TOKENIZER, TEXTS, **options)


def _measured(values):
    """Return the distances of ``(tokens, rows)`` outputs, given as those of a tiny Llama's gate."""
    block = find_blocks(tiny_llama())[0]
    values = torch.cat([values, torch.zeros(len(values), block.d_ff - values.shape[1])], 1)
    moments = ProductMoments(block)
    counts = None
    for collector in (moments, counts):
        collector = collector or ProductCounts(block, *moments.standard())
        for part in values.split(1000):
            collector.add(part.float(), slice(0, block.d_ff))
            collector.tokens += len(part)
    return collector.distance()[0]


def _oracle(values, normal=NORMAL):
    """Return scipy's distances of ``(tokens, rows)`` outputs to a grid of quantiles."""
    found = []
    for row in values.double().numpy().T:
        deviation = row.std()
        standard = (row - row.mean()) / (
            deviation if deviation > 1e-6 * abs(row.mean()) else np.inf
        )
        found.append(wasserstein_distance(standard, normal))
    return torch.tensor(found)


def _draw(kind, count=20_000):
    generator = np.random.default_rng(0)
    uniform = (np.arange(count) + 0.5) / count
    drawn = {
        "normal": NORMAL,
        "shifted and scaled": 1000 + 3 * NORMAL,
        "uniform": uniform,
        "two values": np.sign(uniform - 0.5),
        "two modes": np.sign(uniform - 0.5) * 2 + generator.normal(size=count) * 0.3,
        "heavy tails": generator.standard_t(2.5, size=count),
        "exponential": -np.log(uniform),
        "rare and large": np.where(uniform < 0.001, 100.0, generator.normal(size=count)),
        "sixteen levels": np.round(generator.normal(size=count) * 4) / 4,
    }[kind]
    return torch.from_numpy(np.asarray(drawn)).float()[:, None]


KINDS = (
    "normal",
    "shifted and scaled",
    "uniform",
    "two values",
    "two modes",
    "heavy tails",
    "exponential",
    "rare and large",
    "sixteen levels",
)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipy(kind):
    values = _draw(kind)
    assert _measured(values)[0] == pytest.approx(float(_oracle(values)[0]), abs=0.008)


def test_closed_forms():
    assert _measured(_draw("normal"))[0] < 0.002
    assert _measured(torch.full((100, 1), 3.7))[0] == pytest.approx(CONSTANT, abs=5e-3)
    # +-1 with equal chance: twice the integral of |1 - u| over the upper half of the normal.
    two = 2 * ((norm.cdf(1) - 0.5) - (norm.pdf(0) - norm.pdf(1)))
    two += 2 * (norm.pdf(1) - norm.sf(1))
    assert _measured(_draw("two values"))[0] == pytest.approx(two, abs=0.008)


def _outputs(model, block, texts):
    """Return the outputs of a block's incoming leaves on single documents, gate before up."""
    seen = [[] for _ in block.incoming]
    handles = [
        leaf.register_forward_hook(lambda _, __, y, own=own: own.append(y.flatten(0, -2)))
        for leaf, own in zip(block.incoming, seen, strict=True)
    ]
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([TOKENIZER(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return torch.cat([torch.cat(own) for own in seen], 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt", "qwen3_moe"])
def test_a_profile_holds_that_of_every_incoming_row(architecture):
    model = build(architecture)
    taken = _take(model)
    for domain, texts in TEXTS.items():
        blocks = find_blocks(model)
        assert len(taken[domain].entanglement) == len(blocks)
        for block, found in zip(blocks, taken[domain].entanglement, strict=True):
            assert found.shape == (block.branches, block.d_ff)
            assert found.dtype == torch.float32
            expected = _oracle(_outputs(model, block, texts), NORMAL[5::10])
            assert torch.allclose(found.flatten().double(), expected, atol=0.02)
            assert float((found.flatten() - expected).abs().mean()) < 0.003


def test_is_measured_on_demand():
    assert _take(tiny_llama(), entanglement=False)["code"].entanglement == ()


def _assert_same(mine, theirs):
    for domain in TEXTS:
        pairs = zip(mine[domain].entanglement, theirs[domain].entanglement, strict=True)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)


def test_batches_padding_and_groups_change_nothing(tmp_path):
    model = build("llama")
    whole = _take(model, batch_size=1)
    _assert_same(_take(model, batch_size=8), whole)
    _assert_same(_take(model, max_memory=1), whole)
    _assert_same(_take(model, max_memory=1, work_folder=tmp_path), whole)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(resumption, "STORE_SECONDS", -1.0)
    model, done = build("llama"), []
    whole = _take(tiny_llama())
    run = collection.run_decoder

    def stop(*arguments):
        if len(done) == 20:  # in the counts of the first domain
            raise KeyboardInterrupt
        done.append(None)
        run(*arguments)

    monkeypatch.setattr(collection, "run_decoder", stop)
    with pytest.raises(KeyboardInterrupt):
        _take(model, work_folder=tmp_path)
    again = []
    monkeypatch.setattr(collection, "run_decoder", lambda *a: (again.append(None), run(*a)))
    _assert_same(_take(model, work_folder=tmp_path), whole)
    assert len(done) + len(again) == 4 * 2 * 3  # batches, domains, passes
    assert len(done) == 20


def test_processes_are_added():
    """Two collectors with half the text each, as two processes have them, give that of both."""
    block = find_blocks(tiny_llama())[0]
    values = torch.randn(2, 300, block.d_ff, generator=torch.Generator().manual_seed(0)).exp()

    class Both:
        def __init__(self, other):
            self.others = iter([getattr(other, name) for name in ("tokens", *other.SUMS)])

        def add_up(self, tensor):
            return tensor + next(self.others)

    def collected(make):
        halves = [make() for _ in values]
        for half, part in zip(halves, values, strict=True):
            half.add(part, slice(0, block.d_ff))
            half.tokens += len(part)
        halves[0].combine(Both(halves[1]))
        return halves[0]

    moments = collected(lambda: ProductMoments(block))
    counts = collected(lambda: ProductCounts(block, *moments.standard()))
    expected = _measured(values.flatten(0, 1))
    assert torch.allclose(counts.distance()[0], expected, atol=1e-6)


def test_saved_and_loaded_is_equal(tmp_path):
    taken = _take(build("llama"))
    taken.save_pretrained(tmp_path)
    loaded = Profile.from_pretrained(tmp_path)
    for domain in TEXTS:
        pairs = zip(loaded[domain].entanglement, taken[domain].entanglement, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert all(
        entry["entanglement"] is True for entry in read_meta(tmp_path / "profile.json")["domains"]
    )


def test_a_profile_without_is_read_as_before(tmp_path):
    _take(build("llama"), entanglement=False).save_pretrained(tmp_path)
    assert all("entanglement" not in e for e in read_meta(tmp_path / "profile.json")["domains"])
    assert Profile.from_pretrained(tmp_path)["code"].entanglement == ()


@pytest.mark.parametrize("damage", ["nan", "shape", "missing", "too many"])
def test_damage_is_refused(tmp_path, damage):
    _take(build("llama")).save_pretrained(tmp_path)

    def change(tensors):
        changed = dict(tensors)
        name = "0.1.entanglement"
        if damage == "nan":
            changed[name] = torch.full_like(changed[name], torch.nan)
        elif damage == "shape":
            changed[name] = changed[name].flatten()
        elif damage == "missing":
            del changed[name]
        else:
            changed["0.7.entanglement"] = changed[name].clone()
        return changed

    change_tensors(tmp_path / "profile.json", change)
    with pytest.raises(ArtefactError):
        Profile.from_pretrained(tmp_path)


def test_that_of_two_texts_does_not_follow_from_its_parts():
    taken = _take(build("llama"))
    assert taken.pooled().entanglement == ()
    assert copy.copy(taken).subset(["code"]).pooled().entanglement
