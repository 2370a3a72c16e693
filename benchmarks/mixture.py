"""Groups of neurons beside the static pathway of the same FLOPs, before and after training.

``make benchmark-mixture`` runs it: an hour or two on two cores. Controls have the same sizes, with
groups or with a router that are drawn at random. Every arm is kept in the cache folder when it is
measured, so that the run can be interrupted.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fetching import fetch
from materials import Materials
from publishing import Section, add_page
from torch import Tensor

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.files import read_json, write_atomically
from hf_sparse_pathways.measure.arms import DENSE, measure_arms, pathway_arm
from hf_sparse_pathways.measure.figures import markdown_table

SECTION = Section("mixture", "benchmark-mixture")

STATIC, CLOSED, TRAINED = "static pathway", "groups", "groups, trained"
RANDOM_GROUPS, RANDOM_ROUTER = "random groups", "random router"
ARMS = (STATIC, CLOSED, RANDOM_GROUPS, RANDOM_ROUTER, TRAINED)


def main() -> None:
    """Measure every arm that is not measured, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domain", default="code")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--mixture", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=65536, help="calibration")
    parser.add_argument("--training-tokens", type=int, default=65536)
    parser.add_argument("--scored-tokens", type=int, default=16384, help="held out")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    add_page(parser)
    arguments = parser.parse_args()
    fetch(arguments.cache, arguments.model, [arguments.domain])
    SECTION.publish(Benchmark(arguments).table(), arguments.page)


class RandomGroups(sp.Grouping):
    """Groups of the same size, drawn; routed in closed form."""

    def _assign(self, profiles: Tensor) -> Tensor:
        order = torch.randperm(len(profiles), generator=torch.Generator().manual_seed(self.seed))
        return order // (len(profiles) // self.count)


class RandomRouter(sp.Grouping):
    """The same groups, of which tokens have some by a router that is drawn."""

    def _routed(self, group: Tensor, router: tuple[Tensor, Tensor], x: Tensor) -> sp.NeuronGroups:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(router[0].shape, generator=generator).to(x)
        return super()._routed(group, (drawn, -drawn @ x.mean(0)), x)


GROUPINGS = {CLOSED: sp.Grouping, RANDOM_GROUPS: RandomGroups, RANDOM_ROUTER: RandomRouter}


class Benchmark:
    """The model, its text, and where finished arms lie."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.materials = Materials.of(arguments, "mixture", [arguments.domain])

    def name(self, arm: str) -> str:
        """Return what tells an arm and its settings from others."""
        given = self.arguments
        settings = f"{given.domain}-{given.sparsity:g}-{given.mixture}-{given.top_k}"
        trained = f"-{given.training_tokens}" if arm == TRAINED else ""
        return f"{settings}-{given.max_tokens}{trained}-{arm.replace(',', '').replace(' ', '-')}"

    def measure(self) -> dict[str, dict[str, Any]]:
        """Return each arm's figures, measuring those that were not."""
        results = {}
        for arm in self.arguments.arms:
            path = self.materials.work / f"{self.name(arm)}-{self.arguments.scored_tokens}.json"
            if not path.is_file():
                found = self._score(self.pathways(arm))
                write_atomically(path, json.dumps(found).encode())
            results[arm] = read_json(path)
        return results

    def pathways(self, arm: str) -> sp.Pathways:
        """Return an arm's pathways, made unless they were."""
        return self.materials.pathways(self.name(arm), partial(self._make, arm))

    def _make(self, arm: str) -> sp.Pathways:
        given = self.arguments
        if arm == TRAINED:
            return self._train(self.pathways(CLOSED))
        kind = GROUPINGS.get(arm)
        return sp.select(
            self.materials.dense,
            self.materials.profile(max_tokens=given.max_tokens),
            sparsity=given.sparsity,
            mixture=None if kind is None else kind(count=given.mixture, top_k=given.top_k),
            precision="fastest",
            controls=False,
        )

    def _train(self, pathways: sp.Pathways) -> sp.Pathways:
        given = self.arguments
        model = sp.SparsePathwaysForCausalLM.from_dense(self.materials.dense, pathways)
        settings = sp.RouterSettings(tokens=given.training_tokens)
        texts = {given.domain: self.materials.texts[given.domain][0]}
        trained = sp.train_routers(
            model,
            self.materials.tokenizer,
            texts,
            settings=settings,
            work_folder=self.materials.work / "unfinished",
        )
        print(trained)
        return trained.pathways

    def _score(self, pathways: sp.Pathways) -> dict[str, Any]:
        """Measure pathways on held-out text."""
        given = self.arguments
        sparse = sp.SparsePathwaysForCausalLM.from_dense(self.materials.dense, pathways)
        text = self.materials.scored(given.domain, given.scored_tokens)
        with evaluation_mode(sparse):
            arms = [DENSE, pathway_arm("pathway", given.domain, pathways)]
            dense, row = measure_arms(sparse, text, arms, batch_size=4, seed=0)
        figures = {"ratio": row.ratio, "interval": row.interval, "tokens": row.tokens}
        return {**figures, "dense": dense.perplexity, "flops": row.flops}

    def table(self) -> str:
        """Return the caption and the table."""
        results, given = self.measure(), self.arguments
        some = next(iter(results.values()))
        rows = [
            [arm, f"{found['flops']:.1%}", f"{found['ratio']:.3f}", _interval(found["interval"])]
            for arm, found in results.items()
        ]
        caption = (
            f"**{given.model}**, {given.domain}, calibrated on {given.max_tokens} tokens; "
            f"{given.top_k} of {given.mixture} groups; routers trained on {given.training_tokens} "
            f"tokens. Perplexity ratios to dense ({some['dense']:.2f}) on {some['tokens']} "
            "held-out tokens."
        )
        header = ["arm", "FFN FLOPs", "ratio to dense", "interval"]
        return f"{caption}\n\n{markdown_table(header, rows)}"


def _interval(interval: Any) -> str:
    return "-" if interval is None else "-".join(f"{bound:.3f}" for bound in interval)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
