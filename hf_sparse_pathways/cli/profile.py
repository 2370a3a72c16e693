"""``sparse-pathways profile``: take the activation profile of each domain's text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.launch import join_launch, leave_unless_first
from hf_sparse_pathways.cli.loading import load_dense, unfinished_work
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.discovery.documents import ROUTER_TOKENS
from hf_sparse_pathways.memory import MAX_MEMORY, parse_memory
from hf_sparse_pathways.outputs import check_output, written_whole

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.profiles import Profile

HELD_OUT = 0.2


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What the commands that run over calibration text have in common; see their options."""

    max_tokens: int
    max_length: int | None
    batch_size: int
    held_out: float
    seed: int
    precision: str
    max_memory: str
    inputs: bool = False
    validation_share: float = 0.0
    router_tokens: int = 0

    @property
    def read_tokens(self) -> int:
        """Tokens per domain that are drawn at most, of which a stream has to have as many."""
        return max(self.max_tokens, self.router_tokens)

    def __post_init__(self) -> None:
        """Check what needs no model to be checked.

        Raises:
            PathwaysError: It is no size of memory, or windows are too short.
        """
        from hf_sparse_pathways.discovery.windows import check_length

        parse_memory(self.max_memory)
        if self.max_length is not None:
            check_length(self.max_length)


def needs_inputs(compensation: str | None) -> bool:
    """Whether Gram matrices have to hold the blocks' inputs, on which a bypass is regressed."""
    return "bypass" in (compensation or "")


def run(  # noqa: PLR0913
    model: opt.Model,
    domain: opt.Texts,
    output: opt.Output,
    max_tokens: opt.MaxTokens = opt.CALIBRATION_TOKENS,
    max_length: opt.MaxLength = None,
    batch_size: opt.BatchSize = 8,
    router_tokens: opt.RouterTokens = ROUTER_TOKENS,
    held_out: opt.HeldOut = HELD_OUT,
    seed: opt.Seed = 0,
    grams: Annotated[
        bool, typer.Option(help="Take Gram matrices, which repair and --method obs need.")
    ] = True,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="With the blocks' inputs, for a one-shot bypass.")
    ] = False,
    entanglement: Annotated[
        bool,
        typer.Option("--entanglement", help="How far from normal each neuron's products are, too."),
    ] = False,
    max_memory: opt.MaxMemory = MAX_MEMORY,
    precision: opt.Precision = "fastest",
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
) -> None:
    """Profile a dense model's FFN neurons on each domain's text and save the statistics.

    An interrupted run goes on where it stood when it is started again with the same options.
    """
    from hf_sparse_pathways.measure.routed_experts import expert_sections, summarise_experts

    texts = parse_texts(domain)
    check_output(output, overwrite, "profile.json")
    sampling = Sampling(
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
        precision=precision,
        max_memory=max_memory,
        inputs=inputs,
        router_tokens=router_tokens,
    )
    launch = join_launch()
    calibration = calibration_texts(texts, held_out, seed, sampling.read_tokens)
    dense, tokenizer = load_dense(model, dtype)
    with unfinished_work(model, dtype, output.absolute(), texts, sampling) as work:
        taken = take_profile(
            dense,
            tokenizer,
            calibration,
            sampling,
            work,
            grams=grams,
            entanglement=entanglement,
            launch=launch,
        )
        leave_unless_first(launch)
        with written_whole(output) as folder:
            taken.save_pretrained(folder)
    for section in expert_sections(summarise_experts(taken)):
        print_table(section.title, section.header, section.rows)
    typer.echo(f"{taken} -> {output}")


def take_profile(  # noqa: PLR0913
    dense: Any,
    tokenizer: Any,
    texts: dict[str, Any],
    sampling: Sampling,
    work: Path,
    *,
    grams: bool,
    entanglement: bool = False,
    launch: Any = None,
) -> "Profile":
    """Take a profile, with unfinished sums in a work folder; see ``join_launch`` for the last."""
    from hf_sparse_pathways.discovery.profiling import profile

    return profile(
        dense,
        tokenizer,
        texts,
        max_tokens=sampling.max_tokens,
        max_length=sampling.max_length,
        batch_size=sampling.batch_size,
        seed=sampling.seed,
        grams=grams,
        inputs=sampling.inputs,
        entanglement=entanglement,
        validation_share=sampling.validation_share,
        router_tokens=sampling.router_tokens,
        precision=sampling.precision,
        max_memory=sampling.max_memory,
        work_folder=work,
        accelerator=launch,
    )


def calibration_texts(
    texts: opt.Sources, held_out: float, seed: int, tokens: int
) -> dict[str, Any]:
    """Read each domain's documents and set some aside, which ``evaluate`` will find again."""
    return {name: split[0] for name, split in split_texts(texts, held_out, seed, tokens).items()}


def split_texts(
    texts: opt.Sources, held_out: float, seed: int, tokens: int
) -> dict[str, tuple[Any, Any | None]]:
    """Return each domain's calibration and held-out documents; None if none are held out.

    Args:
        texts: Where to read.
        held_out: Fraction of the documents.
        seed: Of the split.
        tokens: How many are going to be drawn per domain, which says how far a stream is read.
    """
    from hf_sparse_pathways.discovery.text import read_documents
    from hf_sparse_pathways.pathways.names import check_domain_name

    for name in texts:
        check_domain_name(name)
    documents = {
        name: read_documents(path, seed=seed, tokens=tokens) for name, path in texts.items()
    }
    if held_out == 0:
        return {name: (read, None) for name, read in documents.items()}
    return {name: read.split(held_out, seed) for name, read in documents.items()}
