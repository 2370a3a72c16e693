"""Which FFN layer is best at equal training FLOPs: sgatlin, PEER, SwiGLU, MLP, mixture of experts.

    python benchmarks/isoflop.py --text FOLDER [FOLDER ...] --output DIR

trains small decoders on bytes, each kind of layer at each budget with each seed, and writes a table
and a picture of perplexity (per byte) against FLOPs. The learning rate is each kind's best of a
few, chosen at the smallest budget by other held-out documents than those that are reported. Every
run is stored when it is done: the same command, with the same text, goes on from there. ``--small``
takes minutes.
"""

import argparse
import json
import math
import multiprocessing
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from isoflop_training import KINDS, Run, Shape, Text, train
from publishing import Section, add_page

from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.files import read_json, write_atomically
from hf_sparse_pathways.measure.figures import format_figure, markdown_table
from hf_sparse_pathways.measure.plotting import load_plots

SECTION = Section("isoflop", "benchmark-isoflop")

HELD_OUT = 0.2
FULL, SMALL = (1e12, 2e12, 4e12), (5e10, 1.5e11, 4.5e11)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained.

    Attributes:
        kinds: Of layers.
        budgets: Training FLOPs, ascending.
        seeds: Of each; the first one is that of the choice of learning rates.
        learning_rates: To choose from.
        shape: Of all models.
        scored: Bytes of each held-out part that are scored.
    """

    kinds: Sequence[str]
    budgets: Sequence[float]
    seeds: Sequence[int]
    learning_rates: Sequence[float]
    shape: Shape
    scored: int


def main() -> None:
    """Train what was not trained before; write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, help="files, folders or globs")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--small", action="store_true", help="tiny budgets, one seed: minutes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--budgets", nargs="+", type=float, help="training FLOPs")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--learning-rates", nargs="+", type=float)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes of a window")
    parser.add_argument("--batch", type=int, help="windows of a step")
    parser.add_argument("--scored", type=int, help="held-out bytes that are scored")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    add_page(parser)
    given = parser.parse_args()
    small = given.small
    plan = Plan(
        kinds=given.kinds,
        budgets=sorted(given.budgets or (SMALL if small else FULL)),
        seeds=given.seeds or ([0] if small else [0, 1]),
        learning_rates=given.learning_rates or ([3e-3] if small else [3e-4, 1e-3, 3e-3, 1e-2]),
        shape=Shape(
            d_model=given.d_model,
            layers=given.layers,
            length=given.length,
            batch=(4 if small else 8) if given.batch is None else given.batch,
        ),
        scored=(16384 if small else 131072) if given.scored is None else given.scored,
    )
    numbers = (*plan.budgets, *plan.learning_rates, plan.shape.batch, given.processes)
    if not all(number > 0 for number in numbers):
        parser.error("--budgets, --learning-rates, --batch and --processes have to be above 0")
    if plan.scored < plan.shape.length or len({*plan.seeds}) < len(plan.seeds):
        parser.error("--scored takes at least a window's --length, and --seeds each seed once")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # and its processes with it
    text = read_text(given.text)
    text.check(plan.shape.length)
    runs = given.output / "runs" / text.digest
    results = measure(plan, text, runs, given.processes)
    table = to_markdown(plan, results)
    write_atomically(given.output / "isoflop.md", f"{table}\n".encode())
    SECTION.publish(table, given.page)
    write_picture(results, given.output)


def read_text(sources: Sequence[str]) -> Text:
    """Read texts as bytes, their documents split into three parts that share none."""
    parts = [bytearray(), bytearray(), bytearray()]
    for source in sources:
        rest, held_out = read_documents(source, seed=0).split(HELD_OUT, 0)
        validation, test = held_out.split(0.5, 0)
        for part, documents in zip(parts, (rest, validation, test), strict=True):
            for document in documents.items:
                part += document.text.encode(errors="replace") + b"\0"
    return Text(*map(bytes, parts))


def measure(plan: Plan, text: Text, folder: Path, processes: int = 1) -> list[dict[str, Any]]:
    """Return the results of all runs of a plan, training those that are not stored."""

    def runs(flops: float, seed: int, rates: Mapping[str, Sequence[float]]) -> list[Run]:
        return [
            Run(kind=kind, flops=flops, seed=seed, learning_rate=rate, shape=plan.shape)
            for kind in plan.kinds
            for rate in rates[kind]
        ]

    def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
        paths = [folder / f"{run.name}-{plan.scored}.json" for run in runs]
        missing = {path: run for path, run in zip(paths, runs, strict=True) if not path.is_file()}
        train_all(missing, text, plan.scored, processes)
        return [read_json(path) for path in paths]

    tried = dict.fromkeys(plan.kinds, plan.learning_rates)
    best = {
        kind: [min(own, key=itemgetter("validation"))["learning_rate"]]
        for kind, own in _by_kind(results(runs(plan.budgets[0], plan.seeds[0], tried)))
    }
    wanted = [
        run for seed in plan.seeds for flops in plan.budgets for run in runs(flops, seed, best)
    ]
    return results(wanted)


def train_all(missing: Mapping[Path, Run], text: Text, scored: int, processes: int) -> None:
    """Train runs and store each at its path, several at a time, the longest first."""
    jobs = sorted(missing.items(), key=lambda job: -job[1].flops)
    store = partial(train_one, text=text, scored=scored)
    if processes == 1:
        for job in jobs:
            store(*job)
        return
    context = multiprocessing.get_context("spawn")  # a fork has no threads of its own to train with
    workers = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(processes, mp_context=context, **workers) as pool:
        try:
            for done in as_completed([pool.submit(store, *job) for job in jobs]):
                done.result()
        except BaseException:  # or the pool would train all that is left before it ends
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def train_one(path: Path, run: Run, text: Text, scored: int) -> None:
    """Train one run and store it."""
    made = train(run, text, scored)
    write_atomically(path, json.dumps(made, indent=1).encode())
    print(f"{run.name}: perplexity {math.exp(made['test']):.3f}", flush=True)


def to_markdown(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return the table: a row per kind, perplexity at each budget over the seeds."""
    header = ["layer", "parameters", "FLOPs per token", "learning rate"]
    header += [f"{budget:.1e} FLOPs" for budget in plan.budgets]
    rows = []
    for kind, own in _by_kind(results):
        one = own[0]
        figures = [_spread([r for r in own if r["budget"] == budget]) for budget in plan.budgets]
        sizes = [f"{one['parameters']:,}", f"{one['forward_flops_per_token']:,}"]
        rows.append([kind, *sizes, _tuned(plan, one["learning_rate"]), *figures])
    first = [r for r in results if (r["kind"], r["seed"]) == (plan.kinds[0], plan.seeds[0])]
    tokens = ", ".join(f"{r['tokens']:,}" for r in first)
    note = (
        f"Perplexity per byte on {plan.scored:,} bytes of documents that no run has seen, median "
        f"(lowest-highest) of {len(plan.seeds)} seeds; d_model {plan.shape.d_model}, "
        f"{plan.shape.layers} layers, windows of {plan.shape.length} bytes. {plan.kinds[0]} was "
        f"trained on {tokens} bytes, the others on as many as their FLOPs allow. The learning rate "
        f"is the best of {', '.join(f'{rate:g}' for rate in plan.learning_rates)} at the smallest "
        "budget by other documents, (end) if a smaller or larger one might have been better."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def _tuned(plan: Plan, rate: float) -> str:
    """Name a learning rate, and say whether it lies at an end of those that were tried."""
    ends = {min(plan.learning_rates), max(plan.learning_rates)}
    return f"{rate:g} (end)" if rate in ends else f"{rate:g}"


def _spread(results: Sequence[dict[str, Any]]) -> str:
    perplexities = sorted(math.exp(result["test"]) for result in results)
    middle = format_figure(statistics.median(perplexities))
    if len(perplexities) == 1:
        return middle
    return f"{middle} ({format_figure(perplexities[0])}-{format_figure(perplexities[-1])})"


def _by_kind(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for kind in dict.fromkeys(result["kind"] for result in results):
        yield kind, [result for result in results if result["kind"] == kind]


def write_picture(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw perplexity against training FLOPs: medians as lines, every seed as a point."""
    load_plots()  # with its message, where matplotlib is missing
    from hf_sparse_pathways.measure.plots.drawing import Picture, line_style, save_figures, tick_log

    figure = Picture(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for index, (kind, own) in enumerate(_by_kind(results)):
        style = line_style(index, 1)
        budgets = sorted({result["budget"] for result in own})
        groups = [[r for r in own if r["budget"] == budget] for budget in budgets]
        flops = [statistics.median(r["flops"] for r in group) for group in groups]
        middle = [math.exp(statistics.median(r["test"] for r in group)) for group in groups]
        axes.plot(flops, middle, label=kind, **style)
        points = [(r["flops"], math.exp(r["test"])) for r in own]
        axes.scatter(*zip(*points, strict=True), s=8, color=style["color"], alpha=0.5)
    perplexities = [math.exp(result["test"]) for result in results]
    tick_log(axes.yaxis, min(perplexities), max(perplexities))
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("perplexity per byte, held out")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    save_figures({"isoflop": figure}, folder)


if __name__ == "__main__":
    main()
