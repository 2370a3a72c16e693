"""int8 weights under pathways: quality and speed beside the model's own dtype, dense and sparse.

``make benchmark-int8`` runs it on the folder that ``make demo`` has built, with its texts. The same
weights are loaded twice, in bfloat16 and quantised by torchao as they are loaded; documents that
were calibrated on are left out. Speeds are timed in turn, with one thread.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from materials import load_shape
from publishing import Section, add_page
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.stored import stored_tensor
from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.speed.results import Spread
from hf_sparse_pathways.measure.speed.runs import decode, random_ids
from hf_sparse_pathways.measure.speed.timing import alternate
from hf_sparse_pathways.measure.speed.workloads import Workload

SECTION = Section("int8", "benchmark-int8")
DENSE = "bfloat16, dense, torch's own linear"
NAME = "smollm2-135m-instruct"


def main() -> None:
    """Measure quality and speed, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--domains", nargs="+", default=["code", "law", "medicine"])
    parser.add_argument("--scored-tokens", type=int, default=4096, help="held out, per domain")
    parser.add_argument("--shape", default="16x2048x8192", help="of a larger, random model")
    parser.add_argument("--rounds", type=int, default=9)
    add_page(parser)
    arguments = parser.parse_args()
    folder = arguments.cache / "demo" / "model"
    if not folder.is_dir():
        sys.exit(f"There is no {folder}: run `make demo` first.")
    torch.set_num_threads(1)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    own, quantised = _load(folder), _load(folder, quantization_config=config)
    parts = [
        quality(own, quantised, folder, arguments),
        speed(NAME, own, quantised, arguments.rounds),
        speed(arguments.shape, *_random(arguments.shape), arguments.rounds),
    ]
    text = "\n\n".join(parts)
    SECTION.publish(text, arguments.page)


def _load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def _random(shape: str) -> tuple[Any, Any]:
    """Return a random model with a random pathway of half of the neurons, and it in int8."""
    own, quantised = (load_shape(shape, "bfloat16") for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    masks = [
        torch.randperm(block.d_ff, generator=generator) < block.d_ff // 2
        for block in find_blocks(own)
    ]
    paths = sp.Pathways.from_masks(own, {"half": masks})
    quantize_(quantised, Int8WeightOnlyConfig())
    sparse = sp.SparsePathwaysForCausalLM.from_dense
    return sparse(own, paths), sparse(quantised, paths)


def quality(own: Any, quantised: Any, folder: Path, arguments: Any) -> str:
    """Return a table of perplexities on held-out documents."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {name: arguments.cache / "texts" / name for name in arguments.domains}
    reports = [
        sp.evaluate(model, tokenizer, texts, controls=False, max_tokens=arguments.scored_tokens)
        for model in (own, quantised)
    ]
    rows = []
    for domain in arguments.domains:
        found = [
            next(row for row in report.rows if row.domain == domain and row.role == role)
            for role in ("dense", "pathway")
            for report in reports
        ]
        first = found[0].perplexity
        cells = [f"{row.perplexity:.2f} ({row.perplexity / first:.3f})" for row in found]
        rows.append([domain, *cells])
    tokens = min(row.tokens for row in reports[0].rows)
    sparsity = own.pathways.sparsity(arguments.domains[0])
    caption = (
        f"{NAME}, pathways of `make demo` ({sparsity:.0%} of the neurons removed): "
        f"perplexity (ratio to bfloat16 dense) on at least {tokens} held-out tokens per domain."
    )
    header = ["text", "bfloat16, dense", "int8, dense", "bfloat16, pathway", "int8, pathway"]
    return f"{caption}\n\n{markdown_table(header, rows)}"


def speed(name: str, own: Any, quantised: Any, rounds: int) -> str:
    """Return a table of decoding speeds at batch 1."""
    domain = own.domains[0]
    models = {DENSE: (_with(own, "compact"), None)}
    for dtype, model in (("bfloat16", own), ("int8", quantised)):
        for executor, chosen in (("compact", domain), ("indexed", domain), ("indexed", None)):
            kind = "dense" if chosen is None else "pathway"
            models[f"{dtype}, {kind}, {executor}"] = (_with(model, executor), chosen)
    models["int8, dense, torchao's own linear"] = (_with(quantised, "compact"), None)
    ids = random_ids(own, Workload(kind="decode", batch=1))
    arms = {
        label: partial(decode, model, ids, 16, domain=chosen)
        for label, (model, chosen) in models.items()
    }
    speeds = alternate(arms, rounds, f"decode, {name}")
    rows = []
    for label, figures in speeds.items():
        model = models[label][0]
        ratio = Spread.of([a / b for a, b in zip(figures, speeds[DENSE], strict=True)])
        weights = {p.data_ptr(): p for p in map(stored_tensor, model.parameters())}
        rows.append(
            [
                label,
                str(ratio),
                f"{sum(tensor.nbytes for tensor in weights.values()) / 1e6:.0f} MB",
                f"{sum(model.resident.values()) / 1e6:.1f} MB",
            ]
        )
    dense = Spread.of(speeds[DENSE]).median
    caption = (
        f"{name}, {own.pathways.sparsity(domain):.0%} of the neurons removed, decoding at batch 1 "
        f"with 1 thread; {DENSE}: {dense:.1f} tokens/s."
    )
    header = ["arm", "tokens/s over the first", "weights", "copies beside them"]
    return f"{caption}\n\n{markdown_table(header, rows)}"


def _with(model: Any, executor: str) -> Any:
    """Return a model that shares another one's weights and has an executor of its own."""
    twin = sp.SparsePathwaysForCausalLM.from_dense(
        model.to_dense(), model.pathways, executor=executor
    )
    twin.max_resident_bytes = "20GB"
    return twin.eval()


if __name__ == "__main__":
    main()
