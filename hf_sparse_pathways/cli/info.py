"""``sparse-pathways info``: what is in a folder or Hub repository. No weights are loaded."""

import json
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.display import plain
from hf_sparse_pathways.shares import format_share

if TYPE_CHECKING:
    from hf_sparse_pathways.pathways.pathway import Pathways

CHOICES = ("method", "allocation", "ridge", "order", "compensation")
"""What the provenance of a pathway that ``select`` made says of how, one column each."""

MOST_TESTED = 2**28
"""Weights of the largest matrix that is made to test a form: a 70B model's. The description says
how large a block is, and nothing else of it has been seen."""


def run(folder: opt.Folder, as_json: opt.Json = False) -> None:
    """Show the domains, their sparsity per layer, their text, the base and the size."""
    layers = describe_layers(folder)
    if layers is not None:
        typer.echo(json.dumps(layers, indent=2) if as_json else _say_layers(layers))
    elif as_json:
        typer.echo(json.dumps(describe(folder), indent=2))
    else:
        print_summary(folder)
        print_blocks(folder)


def describe(source: str | PathLike[str]) -> dict[str, Any]:
    """Return everything that ``info`` shows as JSON values."""
    from hf_sparse_pathways.pathways.pathway import Pathways
    from hf_sparse_pathways.pathways.storage import pathway_files

    pathways = Pathways.from_pretrained(source)
    return {
        "base": {
            "name": pathways.base.name,
            "revision": pathways.base.revision,
            "model_type": pathways.base.model_type,
            "summary": pathways.base.summary,
            "neuron_order": pathways.base.neuron_order,
        },
        "bytes": sum(path.stat().st_size for path in pathway_files(source)),
        "weight_bytes": _weight_bytes(source),
        "executors": _describe_executors(source, pathways),
        "blocks": [block.name for block in pathways.base.blocks],
        "routed": pathways.routed,
        "dense_experts": _dense_experts(pathways),
        "experts": _describe_layers(pathways),
        "domains": {name: _describe_one(pathways, name) for name in pathways.domains},
        "controls": {name: _describe_one(pathways, name) for name in pathways.controls},
    }


def _dense_experts(pathways: "Pathways") -> list[str]:
    """Return the modules with routed experts of which every pathway keeps all."""
    held = any(pathway.experts for pathway in pathways.by_domain.values())
    partly = {shape.name for shape in pathways.base.experts} if held else set()
    return [name for name in pathways.base.routed if name not in partly]


def _describe_layers(pathways: "Pathways") -> list[dict[str, Any]]:
    """Return what each domain and control keeps of every layer's routed experts."""
    return [_describe_layer(pathways, index) for index in range(len(pathways.base.experts))]


def _describe_layer(pathways: "Pathways", index: int) -> dict[str, Any]:
    shape = pathways.base.experts[index]
    named = {**pathways.by_domain, **pathways.controls}
    kept = {name: own.experts[index] for name, own in named.items() if own.experts}
    return {
        "name": shape.name,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "channels": shape.channels,
        "neurons": shape.d_ff,
        "kept": {
            name: {"experts": own.keep.nonzero().flatten().tolist(), "neurons": own.width}
            for name, own in kept.items()
        },
    }


def describe_layers(source: str | PathLike[str]) -> dict[str, Any] | None:
    """Return what ``info`` shows of a model with FFN layers and no pathways; None of others."""
    from transformers.configuration_utils import PreTrainedConfig

    from hf_sparse_pathways.pathways.entry import BASE_TYPE
    from hf_sparse_pathways.sgatlin.settings import read_ffn

    fields: dict[str, Any] = {}
    with suppress(OSError):  # pathways alone need no configuration
        fields, _ = PreTrainedConfig.get_config_dict(str(source))
    if fields.get("ffn") is None or fields.get("domains"):
        return None
    return {
        "base": {"model_type": str(fields.get(BASE_TYPE))},
        "ffn": read_ffn(fields["ffn"]).to_dict(),
        "weight_bytes": _weight_bytes(source),
    }


def _say_layers(facts: dict[str, Any]) -> str:
    """Return the same as text."""
    ffn = dict(facts["ffn"])
    told = f"{plain(facts['base']['model_type'])} with {ffn.pop('kind')} layers as FFNs, no domains"
    lines = [told, *(f"  {name}: {value}" for name, value in ffn.items())]
    if facts["weight_bytes"]:
        lines.append(f"  weights: {facts['weight_bytes'] / 1e6:.1f} MB")
    return "\n".join(lines)


def _weight_bytes(source: str | PathLike[str]) -> int | None:
    """Return the size of the weights beside the pathways; None if there are none in a folder."""
    sizes = [path.stat().st_size for path in Path(source).glob("model*.safetensors")]
    return sum(sizes) or None


def _describe_executors(source: str | PathLike[str], pathways: "Pathways") -> dict[str, str]:
    """Return whether this machine gains by each form of weights, by the first pathway's shapes."""
    import torch

    from hf_sparse_pathways.ffn.block_pathway import FLOATING
    from hf_sparse_pathways.ffn.forms import NATIVE, PACKED
    from hf_sparse_pathways.ffn.verdicts import judge_all
    from hf_sparse_pathways.files import read_json

    config = Path(source, "config.json")
    named = read_json(config).get("dtype") if config.is_file() else None
    known = {str(kind).removeprefix("torch."): kind for kind in FLOATING}
    dtype = known.get(str(named), torch.float32)
    if not pathways.base.blocks:
        return {}
    block = pathways.base.blocks[len(pathways.base.blocks) // 2]
    first = next(iter(pathways.by_domain.values()), None)
    kept = block.d_ff if first is None else first.blocks[len(first.blocks) // 2].kept
    shapes = {(kept, block.d_in), (block.d_out, kept)}
    if max(rows * columns for rows, columns in shapes) > MOST_TESTED:
        return dict.fromkeys(("indexed", "packed"), "not tested, since a block is so large")
    described = {}
    for name, form in (("indexed", NATIVE), ("packed", PACKED)):
        verdict = judge_all(form, shapes, dtype, torch.device("cpu"))
        described[name] = f"{'yes' if verdict.usable else 'no'}, {verdict.reason}"
    return described


def _describe_one(pathways: "Pathways", name: str) -> dict[str, Any]:
    provenance = dict(pathways[name].provenance)
    text = {key: value for key, value in provenance.pop("text", {}).items() if "digests" not in key}
    return {
        **provenance,
        "sparsity": pathways.sparsity(name),
        "expert_sparsity": pathways.expert_sparsity(name),
        "expert_weights": pathways.expert_weights(name),
        "flops": pathways.flops(name),
        "clusters": pathways[name].clusters,
        "skipped": pathways[name].skipped,
        "sparsity_per_block": pathways.sparsity(name, per_block=True),
        "text": text,
    }


def print_summary(source: str | PathLike[str]) -> None:
    """Print the base and the domains."""
    facts = describe(source)
    typer.echo(f"pathways of {plain(facts['base']['name']) or 'a model without a name'}")
    typer.echo(f"  base: {facts['base']['summary']}")
    if facts["base"]["neuron_order"]:
        typer.echo(f"  neurons: permuted ({facts['base']['neuron_order'][:8]})")
    weights = facts["weight_bytes"]
    beside = f"; weights: {weights / 1e6:.1f} MB" if weights else ""
    typer.echo(f"  pathways: {facts['bytes'] / 1e6:.2f} MB{beside}")
    for executor, answer in facts["executors"].items():
        typer.echo(f"  {executor}: {answer}")
    if facts["dense_experts"]:
        typer.echo(f"  routed experts in {len(facts['dense_experts'])} layers stay dense")
    clusters = {arm["clusters"] for arm in facts["domains"].values()} - {1}
    if clusters:
        told = " or ".join(map(str, sorted(clusters)))
        typer.echo(f"  each block's tokens go to {told} experts, with neurons of their own")
    skipped = [arm["skipped"] for arm in facts["domains"].values() if arm["skipped"]]
    if skipped:
        told = " or ".join(dict.fromkeys(f"{share:.0%}" for share in skipped))
        typer.echo(f"  each token skips {told} of the kept neurons, by their gates or groups")
    typer.echo(f"  domain=auto: {_describe_router(facts)}")
    controls = {f"{name} (control)": arm for name, arm in facts["controls"].items()}
    arms = {**facts["domains"], **controls}
    held = any(arm["expert_sparsity"] for arm in arms.values())
    rows = [
        [
            name,
            format_share(arm["sparsity"], 1),
            *([_describe_weights(arm)] if held else []),
            format_share(arm["flops"], 1),
            str(arm["text"].get("tokens", "-")),
            str(arm["text"].get("documents", "-")),
            _shorten(str(arm["text"].get("source", arm.get("method", "-")))),
        ]
        for name, arm in arms.items()
    ]
    header = ["domain", "sparsity", *(["expert weights"] if held else [])]
    header += ["FFN FLOPs", "tokens", "documents", "text"]
    print_table("domains", header, rows)
    if any("allocation" in arm for arm in arms.values()):
        chosen = [[name, *_choices(arm)] for name, arm in arms.items()]
        print_table("what was chosen", ["domain", *CHOICES], chosen)


def _describe_weights(arm: dict[str, Any]) -> str:
    """Say how many weights of routed experts a pathway keeps."""
    share = format_share(1.0 - arm["expert_sparsity"], 1)
    return f"{arm['expert_weights'] / 1e6:.3g} M, {share}"


def _describe_router(facts: dict[str, Any]) -> str:
    """Say between which domains a router can choose."""
    if not facts["routed"]:
        return "no; the domains' text is not known"
    missing = [name for name in facts["domains"] if name not in facts["routed"]]
    beside = f"; never {', '.join(map(plain, missing))}" if missing else ""
    return f"chooses {', '.join(map(plain, facts['routed']))} or dense, by the prompt{beside}"


def _choices(arm: dict[str, Any]) -> list[str]:
    """Return how a pathway was made, in the order of ``CHOICES``; "-" where nothing is known."""
    solved = arm.get("compensation") != "none"
    return [
        _shorten(str(arm[name])) if name in arm and (solved or name != "ridge") else "-"
        for name in CHOICES
    ]


def print_blocks(source: str | PathLike[str]) -> None:
    """Print each FFN block's sparsity under each domain."""
    facts = describe(source)
    arms = {**facts["domains"], **facts["controls"]}
    rows = [
        [block, *(format_share(arm["sparsity_per_block"][index], 1) for arm in arms.values())]
        for index, block in enumerate(facts["blocks"])
    ]
    if rows:
        print_table("sparsity per FFN block", ["block", *arms], rows)
    layers = [_layer_row(layer, arms) for layer in facts["experts"] if layer["kept"]]
    if layers:
        header = ["routed experts", "a token has", *arms]
        print_table("routed experts kept, x neurons of each", header, layers)


def _layer_row(layer: dict[str, Any], arms: dict[str, Any]) -> list[str]:
    """Return how many of a layer's experts each domain and control keeps."""
    whole = {"experts": range(layer["experts"]), "neurons": None}
    channels = layer["channels"]
    top_k, experts = (layer[name] // channels for name in ("top_k", "experts"))
    told = f"{top_k} of {experts} x {layer['neurons']}"
    row = [layer["name"], told if channels == 1 else f"{told}, {channels} times"]
    for name in arms:
        kept = layer["kept"].get(name, whole)
        row.append(f"{len(kept['experts'])} x {kept['neurons'] or layer['neurons']}")
    return row


def _shorten(text: str, length: int = 32) -> str:
    return text if len(text) <= length else f"...{text[3 - length :]}"
