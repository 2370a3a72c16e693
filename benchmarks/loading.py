"""Memory and time of loading one domain's neurons, beside the dense model.

``python benchmarks/loading.py --model FOLDER`` gives a model random keep masks at 50 %, saves it
with its neurons in the original and in the permuted order, and loads each in a process of its own:
peak of resident memory (with one forward pass, and while loading), what the weights take (private
memory after loading, and pages of the checkpoint that stay mapped once all of them were used), and
the bytes of the parameters. All beyond what the process held after the same with a tiny model.
Then all of them decode in turn, plain and with the kernel of ``indexed``.
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.measure.speed.results import Spread
from hf_sparse_pathways.measure.speed.runs import decode, random_ids
from hf_sparse_pathways.measure.speed.timing import alternate
from hf_sparse_pathways.measure.speed.workloads import Workload

DTYPES = ("auto", "bfloat16")
ROUNDS = 9
COLUMNS = {
    "peak": "peak",
    "peak_loading": "loading",
    "private": "private",
    "mapped": "mapped",
    "weights": "weights",
}


def main() -> None:
    """Measure each way of loading, or one of them as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Folder or Hub id of a dense model.")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--domains", type=int, default=2, help="Domains with random masks.")
    parser.add_argument("--domain", help="Load this one and print what it took.")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--save", type=Path, help="Save models with random masks here.")
    parser.add_argument("--measure", action="store_true", help="Load as said, and print.")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.model, arguments.domain, arguments.dtype)))
    elif arguments.save:
        save(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print one line for each way of loading."""
    with tempfile.TemporaryDirectory() as work:
        shared = ["--sparsity", str(arguments.sparsity), "--domains", str(arguments.domains)]
        _run("--model", arguments.model, "--save", work, *shared)
        print(f"{'':30}" + "".join(f"{name:>10}" for name in (*COLUMNS.values(), "seconds")))
        for dtype in DTYPES:
            for label, place, chosen in (
                ("dense", arguments.model, []),
                ("one domain, original", f"{work}/original", ["--domain", "d0"]),
                ("one domain, permuted", f"{work}/permuted", ["--domain", "d0"]),
            ):
                printed = _run("--model", place, *chosen, "--dtype", dtype, "--measure")
                found = json.loads(printed.splitlines()[-1])
                sizes = "".join(f"{found[name] / 1e6:7.1f} MB" for name in COLUMNS)
                print(f"{dtype + ', ' + label:30}{sizes}{found['seconds']:10.2f}", flush=True)
        for dtype in DTYPES:
            print(speed(arguments.model, f"{work}/original", dtype), flush=True)


def _run(*options: str) -> str:
    command = [sys.executable, __file__, *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def save(arguments: argparse.Namespace) -> None:
    """Save a model with random masks in both orders of its neurons."""
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"d{index}": [
            torch.rand(block.d_ff, generator=generator) >= arguments.sparsity
            for block in find_blocks(dense)
        ]
        for index in range(arguments.domains)
    }
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    model.save_pretrained(arguments.save / "original")
    sp.permute(model).save_pretrained(arguments.save / "permuted")


def speed(dense: str, sparse: str, dtype: str) -> str:
    """Return the speeds of decoding at batch 1 over the dense model's, timed in turn."""
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=dtype)
    loaded = {"all neurons": load(sparse), "one domain": load(sparse, domain="d0")}
    model = load(dense)
    ids = random_ids(model, Workload(kind="decode"))
    arms = {"dense": partial(decode, model, ids, 16)}
    for label, plain in (("all neurons", "compact"), ("one domain", "masked")):
        for executor in (plain, "indexed"):
            own = copy.deepcopy(loaded[label]).eval()
            own.set_executor(executor)
            arms[f"{label}, {own.execution.executor}"] = partial(decode, own, ids, 16, domain="d0")
    speeds = alternate(arms, ROUNDS, f"decode, {dtype}")
    lines = [f"{dtype}: tokens/s over dense, median of {ROUNDS} rounds and quartiles"]
    for label, figures in speeds.items():
        ratio = Spread.of([a / b for a, b in zip(figures, speeds["dense"], strict=True)])
        lines.append(f"  {label:28}{ratio}")
    return "\n".join(lines)


@torch.inference_mode()
def measure(folder: str, domain: str | None, dtype: str) -> dict[str, float]:
    """Load a model, compute once, and return bytes beyond those of the start, and seconds."""
    ids = torch.arange(5, 25)[None]
    warm_up(domain, dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = status()
    started = time.perf_counter()
    chosen = {} if domain is None else {"domain": domain}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **chosen)
    seconds = time.perf_counter() - started
    gc.collect()
    loaded = status()
    model(ids)
    return {
        "peak": status()["VmHWM"] - start["VmRSS"],
        "peak_loading": loaded["VmHWM"] - start["VmRSS"],
        "private": loaded["RssAnon"] - start["RssAnon"],
        "mapped": mapped_bytes(),
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "seconds": seconds,
    }


def warm_up(domain: str | None, dtype: str) -> None:
    """Load a tiny model in the same way, so that everything is imported."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    keep = [torch.arange(64) % 2 == 0]
    paths = sp.Pathways.from_masks(dense, {domain or "d0": keep})
    chosen = {} if domain is None else {"domain": domain}
    with tempfile.TemporaryDirectory() as folder:
        sp.SparsePathwaysForCausalLM.from_dense(dense, paths).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **chosen)
    model(torch.arange(5, 25)[None])


def status() -> dict[str, int]:
    """Return the process's memory from ``/proc``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}


def mapped_bytes() -> int:
    """Return the resident bytes of mapped checkpoint files that are not private copies."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0] and " " in name:
            inside = line.endswith(".safetensors")
        elif inside and name in ("Rss", "Anonymous"):
            total += (1 if name == "Rss" else -1) * int(value.split()[0]) * 1024
    return total


if __name__ == "__main__":
    main()
