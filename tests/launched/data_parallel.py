"""Several processes share passes over text, and get what one gets."""

import functools

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.expert_statistics import TENSORS as EXPERT_TENSORS
from hf_sparse_pathways.discovery.statistics import TENSORS
from tests.architectures import build, random_masks
from tests.cli.commands import content, run
from tests.moe.architectures import build_moe
from tests.texts import documents, save_documents, tiny_tokenizer

TEXTS = {name: documents(name, count=9) for name in ("code", "law")}
TOKENIZER = tiny_tokenizer()
profile = functools.partial(
    sp.profile, tokenizer=TOKENIZER, texts=TEXTS, batch_size=2, max_length=16
)


def assert_same_profile(found, expected):
    """Moments are sums of float32 in float64, Gram matrices sums in float32."""
    assert found.domains == expected.domains
    for domain in expected.domains:
        mine, theirs = found[domain], expected[domain]
        assert mine.provenance == theirs.provenance
        assert mine.windows == theirs.windows
        for block, other in zip(mine.blocks, theirs.blocks, strict=True):
            assert block.tokens == other.tokens
            for name in TENSORS:
                exact = {"rtol": 0, "atol": 0} if name in ("abs_max", "positive") else {}
                within = exact or {"rtol": 1e-12, "atol": 1e-12}
                torch.testing.assert_close(getattr(block, name), getattr(other, name), **within)
        for gram, other in zip(mine.grams, theirs.grams, strict=True):
            total = other.load().total
            scale = total.diagonal().sqrt()
            error = (gram.load().total - total).abs() / (scale[:, None] * scale)
            assert error.max() < 1e-5


def check_profile(state, _folder):
    model = build("llama")
    together, alone = (
        profile(model, entanglement=True, **one) for one in ({"accelerator": state}, {})
    )
    assert_same_profile(together, alone)
    for domain in TEXTS:
        mine, theirs = together[domain].entanglement, alone[domain].entanglement
        assert len(mine) == len(theirs) == 3
        for one, other in zip(mine, theirs, strict=True):  # a value at an edge may change its bin
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def check_profile_of_routed_experts(state, _folder):
    model = build_moe("mixtral")
    together, alone = (profile(model, **one) for one in ({"accelerator": state}, {}))
    for domain in TEXTS:
        pairs = zip(together[domain].experts, alone[domain].experts, strict=True)
        for mine, theirs in pairs:
            assert mine.tokens == theirs.tokens > 0
            for name in EXPERT_TENSORS:
                torch.testing.assert_close(
                    getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=1e-6
                )


def check_profile_in_groups_goes_on(state, folder):
    """Each process gets the matrices that the first one stores, and so does the next run."""
    model, work = build("llama"), {"max_memory": 4 * 81**2 * 2, "work_folder": folder}
    expected = profile(model, inputs=True)
    first = profile(model, inputs=True, accelerator=state, **work)
    assert_same_profile(first, expected)
    state.wait_for_everyone()
    before = content(folder)
    assert sum(name.endswith(".safetensors") for name in before) == 2 * 3 + 1  # the background
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse_pathways.discovery.collection.run_decoder", None)  # not needed
        assert_same_profile(profile(model, inputs=True, accelerator=state, **work), first)
    assert content(folder) == before


def check_more_processes_than_batches(state, _folder):
    texts = {"code": TEXTS["code"][:2]}
    arguments = {"texts": texts, "batch_size": 64, "max_length": 64}
    model = build("gpt2")
    together = profile(model, **arguments, accelerator=state)
    assert_same_profile(together, profile(model, **arguments))


def check_evaluate(state, _folder):
    """A batch is computed by one process, so that every figure is the same number."""
    dense = build("llama")
    model = sp.SparsePathwaysForCausalLM.from_dense(
        dense, sp.Pathways.from_masks(dense, random_masks(dense))
    )
    arguments = {"batch_size": 2, "max_length": 16, "max_tokens": 120}
    also = {"other": sp.Pathways.from_masks(dense, random_masks(dense, seed=1))}
    found, alone = (
        sp.evaluate(model, TOKENIZER, TEXTS, also=also, accelerator=accelerator, **arguments)
        for accelerator in (state, None)
    )
    assert found.to_dict() == alone.to_dict()
    assert all(row.interval is not None for row in found.rows)


def check_that_processes_differ_is_told(state, _folder):
    dense = build("llama")
    texts = {"code": documents("code", seed=state.process_index)}
    with pytest.raises(sp.PathwaysError, match="differ between the 2 processes"):
        profile(dense, texts=texts, accelerator=state)
    model = sp.SparsePathwaysForCausalLM.from_dense(
        dense, sp.Pathways.from_masks(dense, random_masks(dense))
    )
    with pytest.raises(sp.PathwaysError, match="differ between the 2 processes"):
        sp.evaluate(model, TOKENIZER, texts, accelerator=state)


def check_commands(state, folder):
    """Only the first process writes and speaks."""
    first = state.is_main_process
    if first:
        build("llama").save_pretrained(folder / "dense")
        TOKENIZER.save_pretrained(folder / "dense")
        save_documents(folder / "code", "code", count=20)
        save_documents(folder / "law", "law", count=20)
    state.wait_for_everyone()
    texts = ["--domain", f"code={folder / 'code'}", "--domain", f"law={folder / 'law'}"]
    report = ["evaluate", folder / "built", *texts, "--json", "--batch-size", 2]
    commands = (
        ["profile", folder / "dense", *texts, "--output", folder / "profile", "--batch-size", 2],
        ["build", folder / "dense", *texts, "--output", folder / "built", "--batch-size", 2],
        [*report, "--report", folder / "report", "--no-plots"],
    )
    for command in commands:
        ran = run(*command)
        assert ran.status == 0, ran.err
        assert bool(ran.out) == first
        state.wait_for_everyone()
    assert (folder / "report" / "report.json").is_file()
    refused = run("heal", folder / "built", *texts, "--output", folder / "healed")
    assert refused.status == 1
    assert f"(process {state.process_index} of 2): heal was started" in refused.err
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK")  # without a launcher
        alone = run(*report)
    if first:
        assert alone.out == ran.out
