"""``sparse-pathways generate``: continue a prompt with a domain's neurons."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse
from hf_sparse_pathways.errors import PathwaysError


def run(  # noqa: PLR0913
    folder: opt.Folder,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; read from stdin if not given.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Domain to use, auto, or prompt (prompt:NAME with a domain as prior) for the "
            "neurons that the prompt uses; the default domain if not given."
        ),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Use all neurons.")] = False,
    guard: Annotated[
        bool, typer.Option("--guard", help="Go on densely where the text leaves the domain.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    executor: Annotated[
        str | None,
        typer.Option(help="auto, or a name in docs/run.md's table of executors."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: opt.Dtype = "auto",
    as_json: opt.Json = False,
) -> None:
    """Generate text with a domain's neurons only."""
    if dense and domain is not None:
        raise PathwaysError("Give --domain or --dense, not both.")
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise PathwaysError("The prompt is empty. Give --prompt TEXT, or text on stdin.")
    model, tokenizer = load_sparse(folder, dtype, executor)
    from transformers import set_seed

    chosen: dict[str, Any] = {"domain": None} if dense else {}
    if domain is not None:
        chosen = {"domain": domain}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    set_seed(seed)
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(
        **inputs,
        **chosen,
        **sampling,
        guard=guard,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    continuation = tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        named = chosen.get("domain", model.config.default_domain)
        used = getattr(output, "domains", [named])[0]
        record: dict[str, Any] = {
            "domain": used,
            "prompt": text,
            "continuation": continuation,
            "tokens": len(new),
        }
        if guard:
            record["switches"] = [asdict(switch) for switch in output.switches[0]]
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    typer.echo(text + continuation)
    _tell_decisions(output)


def _tell_decisions(output: Any) -> None:
    """Say on standard error what has computed the text, where it was not the caller who decided."""
    if hasattr(output, "domains"):
        typer.echo(f"[computed by {output.domains[0] or 'the dense model'}]", err=True)
    for switch in getattr(output, "switches", [[]])[0]:
        told = f"[from new token {switch.token} on by {switch.domain or 'the dense model'}]"
        typer.echo(told, err=True)
