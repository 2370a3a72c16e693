"""How Transformers finds its way to this package from a folder or repository.

``config.json`` names a model type that Transformers does not have, and in ``auto_map`` a module
that lies beside it and imports this package. Without the package, loading stops with Transformers'
own message: trust that module, or install what it imports. Beside pathways without weights the
configuration names their base, so that they load by their own name.
"""

from pathlib import Path
from typing import Any

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import as_json, write_atomically
from hf_sparse_pathways.limits import MOST_JSON_BYTES, MOST_NAME, MOST_PATH
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.reading import parse_json, read_bytes

CONFIG_NAME = "config.json"
MODEL_TYPE = "sparse_pathways"
BASE = "pathways_of"
"""Field of a configuration that stands for the base's, by name and revision."""

BASE_TYPE = "base_model_type"
"""Field that names the base's architecture."""

MODULE_NAME = "sparse_pathways_plugin.py"
AUTO_MAP = {"AutoConfig": f"{Path(MODULE_NAME).stem}.SparsePathwaysConfig"}
MODULE = b'''"""Loads the plug-in that this model needs: pip install hf-sparse-pathways"""
from hf_sparse_pathways import SparsePathwaysConfig
'''


def adapter_files(base: BaseModel) -> dict[str, bytes]:
    """Return what lies beside pathways without weights: name -> content.

    Nothing does if the base has no name to load it by.
    """
    if not base.name:
        return {}
    of = {"name": base.name, **({"revision": base.revision} if base.revision else {})}
    config = {"model_type": MODEL_TYPE, "auto_map": AUTO_MAP, BASE: of}
    return {CONFIG_NAME: as_json(config), MODULE_NAME: MODULE}


def write_adapter_files(base: BaseModel, folder: Path) -> None:
    """Write them, unless the folder has a configuration with its own weights.

    Where the base has no name, those of another one are deleted.
    """
    path = folder / CONFIG_NAME
    if path.exists() and not is_adapter(read_bytes(path, MOST_JSON_BYTES)):
        return
    files = adapter_files(base)
    for name, content in files.items():
        write_atomically(folder / name, content)
    if path.exists() and not files:
        path.unlink()


def is_adapter(config: bytes) -> bool:
    """Whether a configuration only stands for a base's."""
    try:
        fields = parse_json(config)
    except ValueError:
        return False
    return isinstance(fields, dict) and BASE in fields


def has_layers(config: bytes) -> bool:
    """Whether a configuration is of a model with FFN layers of its own, and without pathways."""
    try:
        fields = parse_json(config)
    except ValueError:
        return False
    bare = isinstance(fields, dict) and not fields.get("domains")
    return bare and fields.get("ffn") is not None


def base_of(fields: dict[str, Any]) -> tuple[str, str | None] | None:
    """Return the name and revision of the base that a configuration stands for, if it does.

    Raises:
        ArtefactError: They are not what ``adapter_files`` writes.
    """
    if BASE not in fields:
        return None
    of = fields[BASE]
    given = of if isinstance(of, dict) else {}
    name, revision = given.get("name"), given.get("revision")
    if not _is_text(name, MOST_PATH) or not (revision is None or _is_text(revision, MOST_NAME)):
        raise ArtefactError(f"{CONFIG_NAME}: {BASE} has to name a base model, got {of!r:.200}.")
    return str(name), revision


def _is_text(value: Any, most: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most and value.isprintable()
