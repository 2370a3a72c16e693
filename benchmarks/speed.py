"""Speed of every executor at half of the FFN, on a real model and on the shape of a larger one.

``make benchmark-speed`` runs it with one thread and nothing else on the machine. Pathways are
random, since speed depends on shapes alone: two domains, each with half of every block's neurons,
of which 60 % are common to both, in the permuted order; for mixed batches four of them. What was
measured is kept in the cache folder; ``sparse-pathways benchmark`` does the same for a model of
yours.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fetching import fetch
from materials import LARGE, REAL, load_shape
from publishing import Section, add_page
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.files import read_json, write_atomically
from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.speed.results import Spread
from hf_sparse_pathways.measure.speed.runs import decode, random_ids
from hf_sparse_pathways.measure.speed.timing import TimingSettings, alternate
from hf_sparse_pathways.measure.speed.workloads import Workload, plan_workloads

SECTION = Section("speed", "benchmark-speed")
CASES = ((REAL, "float32"), (REAL, "bfloat16"), (LARGE, "bfloat16"))
SHARED, SPARSITY = 0.6, 0.5
TIMED, MIXED = "ab", "abcd"
PREFILLS = (512,)  # of the real model only: passes of the large one take minutes


def main() -> None:
    """Measure what was not, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    add_page(parser)
    parser.add_argument(
        "--measured", action="store_true", help="time nothing: write what was measured before"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    for model, dtype in CASES:
        name = f"{model}-{dtype}-{arguments.threads}-{arguments.rounds}.json"
        path = arguments.cache / "benchmarks" / "speed" / name
        if not path.is_file() and arguments.measured:
            continue
        if not path.is_file():
            measured = measure(arguments, model, dtype)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(measured, indent=1).encode())
        found.append(read_json(path))
    if not found:
        sys.exit("Nothing was measured with these settings: leave out --measured.")
    text = to_markdown(found)
    SECTION.publish(text, arguments.page)


def measure(arguments: Any, name: str, dtype: str) -> dict[str, Any]:
    """Time one model, and mixed batches of the real one."""
    dense = _load(arguments.cache, name, dtype)
    mixed = time_mixed(_sparse(dense, MIXED), arguments.rounds) if name == REAL else {}
    model = sp.permute(_sparse(dense, TIMED))
    del dense
    runs = [len(attached.state.members.runs[0] or ()) for attached in model._attachment.blocks]
    report = sp.benchmark(
        model,
        TIMED[:1],
        workloads=plan_workloads((1,), PREFILLS if name == REAL else ()),
        settings=TimingSettings(budget=0, rounds=arguments.rounds, new_tokens=16),
    )
    return {"name": name, "runs": max(runs), "report": report.to_dict(), "mixed": mixed}


def _sparse(dense: Any, domains: str) -> Any:
    paths = sp.Pathways.from_masks(dense, draw_masks(dense, domains))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths)


def _load(cache: Path, name: str, dtype: str) -> Any:
    if name != REAL:
        return load_shape(name, dtype)
    fetch(cache, name)
    return AutoModelForCausalLM.from_pretrained(cache / name, dtype=dtype).eval()


def draw_masks(model: Any, domains: str) -> dict[str, list[torch.Tensor]]:
    """Return random keep masks of half of the neurons, most of them common to all domains."""
    generator = torch.Generator().manual_seed(0)
    masks: dict[str, list[torch.Tensor]] = {domain: [] for domain in domains}
    for block in find_blocks(model):
        kept = round(block.d_ff * (1 - SPARSITY))
        common = round(SHARED * kept)
        order = torch.randperm(block.d_ff, generator=generator)
        for own in masks.values():
            rest = order[common:]
            drawn = rest[torch.randperm(len(rest), generator=generator)[: kept - common]]
            mask = torch.zeros(block.d_ff, dtype=torch.bool)
            mask[order[:common]] = True
            mask[drawn] = True
            own.append(mask)
    return masks


def time_mixed(model: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Return, by executor, how much longer a step of mixed rows takes than one of a single domain.

    Each row has a domain of its own.
    """
    ids = random_ids(model, Workload(kind="decode", batch=len(MIXED)))

    rows = {"one": "a", "mixed": [*MIXED], "dense": None}
    arms = {name: partial(decode, model, ids, 16, domain=domain) for name, domain in rows.items()}
    model.max_resident_bytes *= 4
    found = {}
    for executor in ("compact", "packed-all", "indexed"):
        model.set_executor(executor)
        if model.execution.executor != executor:
            continue
        speeds = alternate(arms, rounds, f"mixed, {executor}")
        for arm in ("mixed", "dense"):
            ratios = [a / b for a, b in zip(speeds["one"], speeds[arm], strict=True)]
            found[f"{executor}, {arm}"] = vars(Spread.of(ratios))
    return found


def to_markdown(found: list[dict[str, Any]]) -> str:
    """Return the tables with their captions."""
    return "\n\n".join(part for measured in found for part in _sections(measured))


def _sections(measured: dict[str, Any]) -> list[str]:
    report = measured["report"]
    by_kind = {timing["workload"]["kind"]: timing for timing in report["timings"]}
    decode, ffn = by_kind["decode"], by_kind.get("ffn")
    rows = []
    for label, own in decode["summary"].items():
        if label == "dense":
            continue
        reached = own["fraction_of_ceiling"]
        rows.append(
            [
                label.removesuffix(", a"),
                _spread(own["ratio_to_dense"]),
                _spread(own["ratio_to_same_kernel_dense"]),
                "" if reached is None else f"{own['ceiling']:.2f}",
                "" if reached is None else f"{reached:.0%}",
                _spread(ffn["summary"][label]["ratio_to_dense"]) if ffn else "",
                _megabytes(report, label),
            ]
        )
    shares = decode["shares"]["dense"]
    caption = (
        f"**{measured['name']}**, {report['dtype']}, {report['threads']} thread(s), half of every "
        f"block's neurons removed, in at most {measured['runs']} runs. Dense decodes "
        f"{decode['summary']['dense']['tokens_per_second']['median']:.1f} tokens/s; of its time "
        f"the FFN takes {shares['ffn']:.0%}, attention {shares['attention']:.0%}, the head "
        f"{shares['head']:.0%}."
    )
    header = [
        "executor",
        "decode / dense",
        "/ same-kernel dense",
        "ceiling",
        "of it reached",
        "FFN of 512 tokens / dense",
        "copies",
    ]
    parts = [caption, markdown_table(header, rows)]
    if measured["mixed"]:
        listed = ", ".join(f"{name} {_spread(own)}" for name, own in measured["mixed"].items())
        parts.append(
            f"A decoding step of {len(MIXED)} rows with {len(MIXED)} domains, over one of a single "
            f"domain, in time: {listed}."
        )
    return parts


def _spread(values: dict[str, float]) -> str:
    return str(Spread(**values))


def _megabytes(report: dict[str, Any], label: str) -> str:
    """Return what an arm's pathway keeps in memory beside the weights."""
    executor, _, pathway = label.partition(", ")
    sizes = [
        own["bytes"]
        for own in report["copies"]
        if own["executor"] == executor and own["pathway"] in (pathway, "attention and head")
    ]
    return f"{sum(sizes) / 1e6:.1f} MB" if sum(sizes) else "0"


if __name__ == "__main__":
    main()
