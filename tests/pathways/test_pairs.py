"""Sets of pairs of tokens: what was collected is found, and little else."""

import torch

from hf_sparse_pathways.pathways.pairs import BUCKETS, BYTES, collect_pairs, share_seen


def _all(ids):
    return torch.ones(ids.shape, dtype=torch.bool)


def test_what_was_collected_is_found_in_its_order():
    ids = torch.randint(150_000, (2_000,), generator=torch.Generator().manual_seed(0))
    pairs = collect_pairs([(ids[:1000], _all(ids[:1000])), (ids[1000:], _all(ids[1000:]))])
    assert pairs.dtype == torch.uint8
    assert pairs.shape == (BYTES,)
    texts = ids.view(20, 100)
    assert torch.equal(share_seen(pairs, texts, _all(texts)), torch.ones(20))
    assert float(share_seen(pairs, texts.flip(1), _all(texts)).mean()) < 0.05


def test_pairs_scatter_over_the_buckets():
    """As many as a quarter of the buckets fill about 1 - exp(-1/4) of them, also if ids are low."""
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (600, 50_000, 262_144):
        ids = torch.randint(vocabulary, (BUCKETS // 4,), generator=generator)
        distinct = len({*zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)})
        pairs = collect_pairs([(ids, _all(ids))])
        filled = sum(int((pairs >> bit & 1).sum()) for bit in range(8)) / BUCKETS
        expected = 1 - float(torch.tensor(-distinct / BUCKETS).exp())
        assert abs(filled - expected) < 0.01


def test_tokens_that_do_not_count_part_their_neighbours():
    ids = torch.tensor([1, 2, 3, 4])
    counted = torch.tensor([True, True, False, True])
    pairs = collect_pairs([(ids, counted)])
    assert float(share_seen(pairs, ids, _all(ids))) == float(torch.tensor(1 / 3))
    assert float(share_seen(pairs, ids, counted)) == 1.0


def test_texts_without_pairs_have_none():
    pairs = collect_pairs([])
    assert not pairs.any()
    for size in (0, 1):
        ids = torch.zeros(3, size, dtype=torch.int64)
        assert torch.equal(share_seen(pairs, ids, _all(ids)), torch.zeros(3))
