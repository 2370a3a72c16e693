"""``sparse-pathways serve``: a model with pathways behind OpenAI's HTTP interface."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse
from hf_sparse_pathways.cli.options import parse_pairs
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.serving.limits import Limits

_USUAL = Limits()


def run(  # noqa: PLR0913
    folder: opt.Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. [the Hub id or folder's name]")
    ] = None,
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=DIR",
            help="A domain and its LoRA: a PEFT adapter's folder or Hub id. Repeat for more.",
        ),
    ] = [],  # noqa: B006
    workers: Annotated[
        int, typer.Option(min=1, help="Requests generated at a time.")
    ] = _USUAL.workers,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests generated or waiting; more are told to come back.")
    ] = _USUAL.requests,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most new tokens of a request.")
    ] = _USUAL.tokens,
    guard: Annotated[
        bool,
        typer.Option("--guard", help="Text that leaves its domain goes on with the dense model."),
    ] = False,
    executor: Annotated[
        str | None,
        typer.Option(help="auto, or a name in docs/run.md's table of executors."),
    ] = None,
    dtype: opt.Dtype = "auto",
) -> None:
    """Serve chats and completions; requests choose a domain as model="NAME@DOMAIN"."""
    uvicorn = _import_uvicorn()
    from hf_sparse_pathways.serving.app import make_app
    from hf_sparse_pathways.serving.service import Service

    adapters = parse_pairs(adapter, "--adapter", "folder or Hub id")
    model, tokenizer = load_sparse(folder, dtype, executor)
    if adapters:
        model.attach_adapters(adapters)
    called = name or (Path(folder).resolve().name if Path(folder).is_dir() else folder)
    limits = Limits(workers=workers, requests=max_requests, tokens=max_tokens)
    service = Service(model, tokenizer, called, limits, guard=guard)
    typer.echo(f"{', '.join(service.names)} at http://{host}:{port}/v1")
    uvicorn.run(make_app(service), host=host, port=port, timeout_graceful_shutdown=5)


def _import_uvicorn() -> Any:
    """Return the module.

    Raises:
        PathwaysError: It or FastAPI is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise PathwaysError(
            "Serving needs FastAPI and uvicorn. Install them with "
            f"`pip install hf-sparse-pathways[serve]`. ({error})"
        ) from error
    return uvicorn
