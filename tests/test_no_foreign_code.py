"""Nothing that is read is run: no pickle, no evaluated text, no code from a repository."""

import ast
from pathlib import Path

import pytest

import hf_sparse_pathways

ROOT = Path(hf_sparse_pathways.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

SERIALISERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {
    *("__import__", "compile", "eval", "exec"),
    *("np.load", "numpy.load", "os.popen", "os.system", "torch.load", "torch.save"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("yaml.full_load", "yaml.load", "yaml.load_all", "yaml.unsafe_load"),
}
KEYWORDS = {"allow_pickle", "shell", "trust_remote_code", "weights_only"}


def find_dangers(source):
    """Return what in a module's source would run, or unpickle, what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _top(alias.name) in SERIALISERS]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if _top(name) in SERIALISERS or name in CALLS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in CALLS else []
            found += [word.arg for word in node.keywords if word.arg in KEYWORDS]
    return found


def _top(name):
    return name.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_runs_nothing_that_it_reads(path):
    assert find_dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec(text)",
        "import yaml\nyaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "torch.load(path, weights_only=True)",
    ],
)
def test_a_danger_is_found(source):
    assert find_dangers(source)


def test_what_is_harmless_is_not():
    assert find_dangers("import yaml\nyaml.safe_load(text)\nmodel.eval()\nre.compile('x')") == []
