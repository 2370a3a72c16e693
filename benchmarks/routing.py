"""Where ``domain="auto"`` sends prompts, for every two and three known domains of several.

``python benchmarks/routing.py --cache .cache`` learns what tells each domain's text, as ``build``
does, and routes prompts of held-out documents: of the known domains, of the other domains, and of
any further ``--unknown NAME=PATH``. It takes minutes: the model only writes its own text. What the
decisions are worth in perplexity is measured by ``sparse-pathways route-report --quality``.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fetching import fetch
from publishing import Section, add_page
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.profile import HELD_OUT
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.routing import draw_prompts
from hf_sparse_pathways.measure.routing_report import format_rate
from hf_sparse_pathways.modeling.routing import Router

SECTION = Section("routing", "benchmark-routing")
DOMAINS = ("code", "law", "fiction", "math", "medicine")
CALIBRATED = 1024
"""Tokens that the model runs over: what it needs of them is not looked at here."""


def main() -> None:
    """Learn, route, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--unknown", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--prompts", type=int, default=100, help="per text and length")
    add_page(parser)
    given = parser.parse_args()
    fetch(given.cache, given.model, given.domains)
    texts = {name: given.cache / "texts" / name for name in given.domains}
    text = measure(given, texts, parse_texts(given.unknown))
    SECTION.publish(text, given.page)


def measure(given: Any, texts: Mapping[str, Path], unknown: Mapping[str, Any]) -> str:
    """Return the tables, one per length of prompts."""
    folder = given.cache / given.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = {name: read_documents(path, seed=0).split(HELD_OUT, 0) for name, path in texts.items()}
    known = {name: calibration for name, (calibration, _) in split.items()}
    profile = sp.profile(model, tokenizer, known, max_tokens=CALIBRATED, grams=False)
    held_out = {name: documents for name, (_, documents) in split.items()}
    held_out |= {name: read_documents(path, seed=0) for name, path in unknown.items()}
    parts = [
        f"**{given.model}**, {given.prompts} prompts per text. Known is each choice of two and "
        "three domains; unknown text is of the others"
        + (f", and, as further text, of {', '.join(unknown)}." if unknown else ".")
    ]
    routers = list(learn_routers(profile))
    for length in given.lengths:
        prompts = {
            name: draw_prompts(documents, tokenizer, length=length, most=given.prompts, seed=0)
            for name, documents in held_out.items()
        }
        parts += [f"Prompts of {length} tokens:", table(routers, prompts, [*texts], [*unknown])]
    return "\n\n".join(parts)


def learn_routers(profile: sp.Profile) -> Iterator[Router]:
    """Yield a router for each choice of known domains."""
    for count in (2, 3):
        for known in combinations(profile.domains, count):
            part = profile.subset(known)
            learnt = {name: part.signature(name) for name in known}
            yield Router(signatures={name: one for name, one in learnt.items() if one is not None})


def table(
    routers: Sequence[Router],
    prompts: Mapping[str, Tensor],
    domains: Sequence[str],
    further: Sequence[str],
) -> str:
    """Return the table of one length: a row per choice of known domains."""
    rows = []
    for router in routers:
        known = [*router.signatures]
        others = [name for name in domains if name not in known]
        own = Tally.of(router, prompts, known)
        cells = [own.right, own.wrong, Tally.of(router, prompts, others).sent]
        cells += [Tally.of(router, prompts, further).sent] if further else []
        rows.append([", ".join(known), *cells])
    header = ["known", "right", "wrong domain", "other domains sent anywhere"]
    return markdown_table([*header, *(["further text sent anywhere"] if further else [])], rows)


@dataclass(frozen=True)
class Tally:
    """Where the prompts of some texts went, as a text and a domain, or None, for each."""

    decided: Sequence[tuple[str, str | None]]

    @classmethod
    def of(cls, router: Router, prompts: Mapping[str, Tensor], names: Sequence[str]) -> "Tally":
        """Decide all prompts of some texts."""
        return cls([(name, one.domain) for name in names for one in router.decide(prompts[name])])

    @property
    def right(self) -> str:
        """How many went to their own domain."""
        return self._rate(sum(name == domain for name, domain in self.decided))

    @property
    def wrong(self) -> str:
        """How many went to another domain than theirs."""
        return self._rate(sum(domain not in (None, name) for name, domain in self.decided))

    @property
    def sent(self) -> str:
        """How many went to any domain."""
        return self._rate(sum(domain is not None for _, domain in self.decided))

    def _rate(self, count: int) -> str:
        return format_rate(count, len(self.decided))


if __name__ == "__main__":
    main()
