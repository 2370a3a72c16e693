"""What benchmarks measure on: a model and texts of the cache folder, and what is kept beside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.cli.profile import HELD_OUT
from hf_sparse_pathways.discovery import profile_storage
from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import resolve_length
from hf_sparse_pathways.measure.arms import ScoredText
from hf_sparse_pathways.measure.speed.random_models import ModelShape, random_llama
from hf_sparse_pathways.pathways import storage

REAL, LARGE = "smollm2-135m-instruct", "16x2048x8192"
"""The models whose speed is measured: one of the cache, and the shape of a random one."""


def load_shape(shape: str, dtype: str) -> Any:
    """Return a random model of a shape."""
    return random_llama(ModelShape.parse(shape), getattr(torch, dtype)).eval()


def stored_bytes(pathway: sp.Pathway) -> int:
    """Return the bytes of what a pathway keeps beside the weights."""
    return sum(part.nbytes for block in pathway.blocks for part in block.parts().values())


@dataclass(frozen=True)
class Materials:
    """A model and domains' texts.

    Attributes:
        cache: Folder that both were fetched into.
        model: The model's name.
        domains: The texts' names.
        work: Folder of what is made.
        dtype: The dense model's data type; None for the checkpoint's.
    """

    cache: Path
    model: str
    domains: Sequence[str]
    work: Path
    dtype: str | None = "float32"

    @classmethod
    def of(
        cls, given: Any, benchmark: str, domains: Sequence[str], dtype: str | None = "float32"
    ) -> Self:
        """Return what a benchmark with the options ``--cache`` and ``--model`` measures on."""
        work = given.cache / "benchmarks" / benchmark / given.model
        return cls(given.cache, given.model, domains, work, dtype)

    @cached_property
    def dense(self) -> Any:
        """The dense model."""
        dtype = {} if self.dtype is None else {"dtype": self.dtype}
        return AutoModelForCausalLM.from_pretrained(self.cache / self.model, **dtype).eval()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(self.cache / self.model)

    @cached_property
    def texts(self) -> dict[str, tuple[Documents, Documents]]:
        """Domain -> calibration and held-out documents."""
        folder = self.cache / "texts"
        return {
            name: read_documents(folder / name, seed=0).split(HELD_OUT, 0) for name in self.domains
        }

    def profile(self, **options: Any) -> sp.Profile:
        """Return the profile of the calibration documents, taken unless a benchmark has taken it.

        Args:
            options: Numbers and words, as ``sp.profile`` takes them.
        """
        listed = (f"{name}={value}" for name, value in sorted(options.items()))
        name = "-".join((*self.domains, self.dtype or "auto", *listed))
        folder = self.cache / "benchmarks" / "profiles" / self.model / name
        if not (folder / profile_storage.JSON_NAME).is_file():
            calibration = {domain: split[0] for domain, split in self.texts.items()}
            sp.profile(
                self.dense,
                self.tokenizer,
                calibration,
                work_folder=self.work / "unfinished",
                **options,
            ).save_pretrained(folder)
        return sp.Profile.from_pretrained(folder)

    def pathways(self, name: str, make: Callable[[], sp.Pathways]) -> sp.Pathways:
        """Return pathways, made unless they were.

        Args:
            name: Of their folder in ``work``, which tells all settings from others.
            make: Makes them.
        """
        folder = self.work / name
        if not (folder / storage.JSON_NAME).is_file():
            print(f"making {name}", flush=True)
            make().save_pretrained(folder)
        return sp.Pathways.from_pretrained(folder)

    def scored(self, domain: str, max_tokens: int) -> ScoredText:
        """Return windows of a domain's held-out documents."""
        return ScoredText.draw(
            domain,
            self.texts[domain][1],
            self.tokenizer,
            max_tokens=max_tokens,
            max_length=resolve_length(self.dense, None),
            seed=0,
        )
