"""Files that somebody made on purpose are refused in time, by our errors, and change nothing."""

import os
import resource
import shutil
import signal
import tracemalloc
from contextlib import contextmanager

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways import limits, tensor_files
from hf_sparse_pathways.errors import (
    ArtefactError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
)
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.pathways.apart import folder_for
from hf_sparse_pathways.pathways.description import base_from_json
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.pathways.storage import write_pathways
from hf_sparse_pathways.tensor_files import without_memory
from tests.architectures import build, compensate, prompt, random_masks
from tests.clustered import clustered
from tests.grouped import grouped
from tests.pathways.corruption import read_meta, rewrite
from tests.pathways.hostile import CLUSTERED, GROUPS, JSON, SHARED, SKIPPING, TENSORS, with_header
from tests.pathways.untouched import assert_same, snapshot
from tests.skipping import skipping

CORPUS = {f"json: {name}": damage for name, damage in JSON.items()}
CORPUS |= {f"tensors: {name}": damage for name, damage in TENSORS.items()}
SECONDS = 20
"""Most time that a file may take; the slowest takes a second."""


def pathways():
    """Return pathways with every part, and a control."""
    dense = build("llama")
    paths = compensate(dense, random_masks(dense))
    made = {"method": "tests", "text": {"source": "x", "digests": ["a"], "tokens": 5}}
    by_domain = {n: Pathway(blocks=p.blocks, provenance=made) for n, p in paths.by_domain.items()}
    pooled = Pathway.from_keep(random_masks(dense, ["x"], seed=7)["x"], made)
    return Pathways(base=paths.base, by_domain=by_domain, controls={"pooled": pooled})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pathways().save_pretrained(folder / "together")
    write_pathways(pathways(), folder / "apart", apart=True)
    clustered(build("llama")).save_pretrained(folder / "clustered")
    write_pathways(clustered(build("llama")), folder / "clustered apart", apart=True)
    clustered(build("llama"), shared=True).save_pretrained(folder / "shared")
    dense = build("llama")
    random = compensate(dense, random_masks(dense))
    skipping(random, prompt(2, 7), dense).save_pretrained(folder / "skipping")
    grouped(random).save_pretrained(folder / "grouped")
    return folder


@pytest.fixture(scope="module")
def untouched():
    """A model, and what it is before anything hostile comes near it."""
    model = sp.SparsePathwaysForCausalLM.from_dense(build("llama"), pathways()).eval()
    return model, snapshot(model)


@contextmanager
def in_time(seconds=SECONDS):
    """Within the block, a call that does not return is an error."""

    def stop(*_):
        raise AssertionError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _assert_refused(folder, untouched, **only):
    model, before = untouched
    with in_time(), pytest.raises(PathwaysError) as caught:
        model.set_pathways(Pathways.from_pretrained(folder, **only))
    assert isinstance(caught.value, (ArtefactError, MismatchError, UnknownNameError))
    assert str(caught.value).isprintable(), "a terminal would obey it"
    assert len(str(caught.value)) < 2000
    assert_same(before, snapshot(model))


def test_the_corpus_is_large():
    assert len(CORPUS) > 100


@pytest.mark.parametrize("damage", CORPUS)
def test_a_hostile_pair_is_refused(damage, saved, tmp_path, untouched):
    shutil.copytree(saved / "together", tmp_path / "x")
    CORPUS[damage](tmp_path / "x" / "pathways.json")
    _assert_refused(tmp_path / "x", untouched)


@pytest.mark.parametrize(
    "damage", [name for name in CORPUS if " control" not in name and name != "json: many apart"]
)
def test_a_hostile_domain_apart_is_refused(damage, saved, tmp_path, untouched):
    shutil.copytree(saved / "apart", tmp_path / "x")
    CORPUS[damage](tmp_path / "x" / folder_for("law") / "pathways.json")
    _assert_refused(tmp_path / "x", untouched)


@pytest.mark.parametrize("damage", TENSORS)
def test_one_domain_alone_is_no_way_around(damage, saved, tmp_path, untouched):
    shutil.copytree(saved / "together", tmp_path / "x")
    TENSORS[damage](tmp_path / "x" / "pathways.json")
    _assert_refused(tmp_path / "x", untouched, only="code")


@pytest.mark.parametrize("only", [{}, {"only": "code"}])
@pytest.mark.parametrize("damage", CLUSTERED)
def test_hostile_clusters_are_refused(damage, only, saved, tmp_path, untouched):
    for name, place in (("clustered", ""), ("clustered apart", folder_for("code"))):
        shutil.copytree(saved / name, tmp_path / name)
        CLUSTERED[damage](tmp_path / name / place / "pathways.json")
        _assert_refused(tmp_path / name, untouched, **only)


@pytest.mark.parametrize("damage", SHARED)
def test_hostile_shared_refits_are_refused(damage, saved, tmp_path, untouched):
    shutil.copytree(saved / "shared", tmp_path / "shared")
    SHARED[damage](tmp_path / "shared" / "pathways.json")
    _assert_refused(tmp_path / "shared", untouched)


@pytest.mark.parametrize("only", [{}, {"only": "code"}])
@pytest.mark.parametrize("damage", SKIPPING)
def test_hostile_thresholds_are_refused(damage, only, saved, tmp_path, untouched):
    shutil.copytree(saved / "skipping", tmp_path / "skipping")
    SKIPPING[damage](tmp_path / "skipping" / "pathways.json")
    _assert_refused(tmp_path / "skipping", untouched, **only)


@pytest.mark.parametrize("only", [{}, {"only": "code"}])
@pytest.mark.parametrize("damage", GROUPS)
def test_hostile_groups_are_refused(damage, only, saved, tmp_path, untouched):
    shutil.copytree(saved / "grouped", tmp_path / "grouped")
    GROUPS[damage](tmp_path / "grouped" / "pathways.json")
    _assert_refused(tmp_path / "grouped", untouched, **only)


@pytest.mark.parametrize(("architecture", "count", "rows"), [("llama", 1, 2), ("phi3", 2, 1)])
def test_leaves_that_a_block_does_not_have_are_refused(architecture, count, rows):
    dense = build(architecture)
    live = sp.SparsePathwaysForCausalLM.from_dense(dense, compensate(dense, random_masks(dense)))
    base, blocks = live.pathways.base, []
    for shape in base.blocks:
        keep = torch.ones(shape.d_ff, dtype=torch.bool)
        changes = [torch.zeros(rows * shape.d_ff, shape.d_in) for _ in range(count)]
        blocks.append(BlockPathway(keep=keep, incoming=tuple(changes)))
    wrong = Pathways(base=base, by_domain={"code": Pathway(blocks=tuple(blocks))})
    before = snapshot(live)
    with pytest.raises(MismatchError, match="made for this model"):
        live.set_pathways(wrong)
    assert_same(before, snapshot(live))


@pytest.mark.parametrize("damage", ["json: a key twice", "tensors: delta of NaN"])
def test_a_checkpoint_with_hostile_pathways_gives_no_model(damage, untouched, tmp_path):
    untouched[0].save_pretrained(tmp_path)
    CORPUS[damage](tmp_path / "pathways.json")
    for options in ({}, {"domain": "code"}):
        with pytest.raises(PathwaysError):
            sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path, **options)


# -- what is allocated --------------------------------------------------------------------------


def test_nothing_is_read_of_a_file_whose_header_is_wrong(saved, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(tensor_files.TensorFile, "read", lambda *args: read.append(args) or {})
    for name in ("keep of another width", "delta of another height", "more than is described"):
        shutil.copytree(saved / "together", tmp_path / name)
        TENSORS[name](tmp_path / name / "pathways.json")
        with pytest.raises(PathwaysError):
            Pathways.from_pretrained(tmp_path / name)
    assert not read
    with pytest.raises(PathwaysError):  # nothing comes back, but it was asked for
        Pathways.from_pretrained(saved / "together")
    assert read


@pytest.mark.parametrize(("dtype", "message"), [("I8", "nothing that"), ("BOOL", "mask")])
def test_a_large_tensor_takes_no_memory(dtype, message, saved, tmp_path, monkeypatch):
    shutil.copytree(saved / "together", tmp_path / "x")
    path, size = tmp_path / "x" / "pathways.json", 2**32
    header = {"0.0.keep": {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}
    rewrite(path, data=with_header(header, b""))
    digest = read_meta(path)["tensors_sha256"]
    monkeypatch.setattr("hf_sparse_pathways.files._digest", lambda _: digest)
    tensors = path.with_suffix(".safetensors")
    os.truncate(tensors, tensors.stat().st_size + size)  # a hole: it takes no space on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PathwaysError, match=message):
        Pathways.from_pretrained(tmp_path / "x")
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert more < size / 16


def test_a_file_of_json_is_read_no_further_than_may_be(saved, tmp_path):
    shutil.copytree(saved / "together", tmp_path / "x")
    JSON["a gigabyte"](tmp_path / "x" / "pathways.json")
    tracemalloc.start()
    with pytest.raises(ArtefactError, match=f"more than the {limits.MOST_JSON_BYTES} bytes"):
        Pathways.from_pretrained(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# -- what has to be read ------------------------------------------------------------------------


def test_the_largest_models_fit_into_the_limits():
    blocks = [
        {"name": f"layers.{i}.mlp", "d_in": 16384, "d_ff": 53248, "d_out": 16384, "branches": 2}
        for i in range(126)
    ]
    base = {"name": "x", "revision": None, "model_type": "llama", "blocks": blocks, "routed": []}
    shapes = base_from_json(base).blocks
    for shape in shapes:
        keep = without_memory(torch.bool, shape.d_ff)
        delta = without_memory(torch.bfloat16, shape.d_out, 40000)
        change = without_memory(torch.bfloat16, 40000, shape.d_in)
        part = BlockPathway(keep=keep, delta=delta, incoming=(change, change))
        part.check(shape.name, shape.d_in, shape.d_ff, shape.d_out, shape.branches)
    names = 126 * 8 * 100  # parts of 100 domains, about a hundred bytes each in a header
    assert 100 * names < limits.MOST_HEADER_BYTES


def test_a_link_to_a_file_is_followed_as_in_the_hubs_cache(saved, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (saved / "together").iterdir():
        shutil.copy(file, tmp_path / "blobs" / file.name)
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert Pathways.from_pretrained(tmp_path / "snapshot").domains == ["code", "law"]


# -- what is deleted ----------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["pathways", "pathways/backup-20240101"])
def test_a_save_deletes_nothing_behind_a_link(link, saved, tmp_path):
    folder, other = tmp_path / "x", tmp_path / "mine"
    shutil.copytree(saved / "together", folder)
    kept = other / "backup-20240101" if link == "pathways" else other
    kept.mkdir(parents=True)
    for name in ("thesis.txt", "pathways.json"):
        (kept / name).write_text("mine")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(other)
    meta = {**read_meta(folder / "pathways.json"), "apart": {"x": "pathways/backup-20240101"}}
    rewrite(folder / "pathways.json", meta)
    pathways().save_pretrained(folder)
    assert sorted(file.name for file in kept.iterdir()) == ["pathways.json", "thesis.txt"]


def test_a_save_deletes_two_files_of_a_domain_and_nothing_else(saved, tmp_path):
    shutil.copytree(saved / "apart", tmp_path / "x")
    law, code = (tmp_path / "x" / folder_for(name) for name in ("law", "code"))
    (law / "thesis.txt").write_text("mine")
    pathways().save_pretrained(tmp_path / "x")
    assert [file.name for file in law.iterdir()] == ["thesis.txt"]
    assert not code.exists()
