"""Imports follow the data, and importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse_pathways

ROOT = Path(hf_sparse_pathways.__file__).parent
PACKAGE = "hf_sparse_pathways"
ORDER = (
    (
        "errors",
        "version",
        "display",
        "limits",
        "reading",
        "tensor_files",
        "files",
        "memory",
        "outputs",
        "processes",
        "shares",
        "tables",
        "tokens",
        "transport",
    ),
    ("native",),
    ("sgatlin",),
    ("ffn",),
    ("pathways",),
    ("discovery",),
    ("modeling",),
    ("healing",),
    ("measure",),
    ("share",),
    ("serving",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}

LAZY = {
    # Against the order of modules, or to be light when it is imported.
    ("pathways.pathway", "pathways.storage"),
    ("pathways.pathway", "share.pushing"),
    ("modeling.saving", "share.card"),
    ("modeling.saving", "share.pushing"),
    ("discovery.profiles", "discovery.profile_storage"),
    ("measure.analysis", "measure.analysis_report"),
    ("modeling.configuration", "modeling.classes"),
    ("modeling.model", "modeling.classes"),
    # No command imports torch before it runs.
    ("cli.analyze", "discovery.percentile"),
    ("cli.analyze", "discovery.profiles"),
    ("cli.analyze", "measure.analysis"),
    ("cli.analyze", "measure.analysis_report"),
    ("cli.analyze", "measure.entangled_rows"),
    ("cli.analyze", "measure.experiments"),
    ("cli.analyze", "measure.gating_report"),
    ("cli.analyze", "measure.model_size"),
    ("cli.analyze", "measure.scale"),
    ("cli.analyze", "measure.specialisation"),
    ("cli.analyze", "pathways.base"),
    ("cli.benchmark", "measure.speed.benchmarking"),
    ("cli.benchmark", "measure.speed.random_models"),
    ("cli.benchmark", "measure.speed.tables"),
    ("cli.benchmark", "measure.speed.timing"),
    ("cli.benchmark", "measure.speed.workloads"),
    ("cli.budgets", "discovery.allocation"),
    ("cli.budgets", "discovery.budget"),
    ("cli.budgets", "discovery.goal"),
    ("cli.budgets", "discovery.recipe"),
    ("cli.budgets", "discovery.selection"),
    ("cli.budgets", "measure.quality"),
    ("cli.budgets", "measure.speed_target"),
    ("cli.build", "discovery.allocation"),
    ("cli.build", "discovery.expert_selection"),
    ("cli.build", "discovery.goal"),
    ("cli.build", "discovery.grouping"),
    ("cli.budgets", "modeling.causal_lm"),
    ("cli.build", "discovery.profiles"),
    ("cli.build", "discovery.recipe"),
    ("cli.build", "discovery.selection"),
    ("cli.build", "modeling.causal_lm"),
    ("cli.build", "modeling.permutation"),
    ("cli.build", "modeling.structure"),
    ("cli.build", "pathways.base"),
    ("cli.build", "pathways.names"),
    ("cli.compare", "discovery.goal"),
    ("cli.compare", "files"),
    ("cli.compare", "measure.comparison"),
    ("cli.compare", "measure.contenders"),
    ("cli.distil", "healing.distilling"),
    ("cli.distil", "healing.reconstruction"),
    ("cli.distil", "measure.distillation"),
    ("cli.evaluate", "measure.quality"),
    ("cli.evaluate", "pathways.pathway"),
    ("cli.export", "discovery.profiles"),
    ("cli.export", "modeling.baking"),
    ("cli.export", "share.exporting"),
    ("cli.export", "share.plain_card"),
    ("cli.heal", "healing.healing"),
    ("cli.info", "ffn.block_pathway"),
    ("cli.info", "ffn.forms"),
    ("cli.info", "ffn.verdicts"),
    ("cli.info", "files"),
    ("cli.info", "pathways.entry"),
    ("cli.info", "sgatlin.settings"),
    ("cli.info", "pathways.pathway"),
    ("cli.info", "pathways.storage"),
    ("cli.loading", "modeling.causal_lm"),
    ("cli.loading", "modeling.tokenizing"),
    ("cli.loading", "pathways.revision"),
    ("cli.compare", "pathways.base"),
    ("cli.profile", "discovery.profiling"),
    ("cli.profile", "discovery.text"),
    ("cli.profile", "discovery.windows"),
    ("cli.profile", "measure.routed_experts"),
    ("cli.profile", "pathways.names"),
    ("cli.push", "files"),
    ("cli.push", "measure.quality_report"),
    ("cli.push", "pathways.pathway"),
    ("cli.push", "share.card"),
    ("cli.push", "share.domains"),
    ("cli.push", "share.pushing"),
    ("cli.remove_domain", "share.domains"),
    ("cli.report", "files"),
    ("cli.report", "measure.analysis"),
    ("cli.report", "measure.quality_report"),
    ("cli.report", "measure.speed.report"),
    ("cli.report", "share.page"),
    ("cli.rename_domain", "share.domains"),
    ("cli.route_report", "measure.routing"),
    ("cli.serve", "serving.app"),
    ("cli.train_router", "healing.router_training"),
    ("cli.training", "pathways.pathway"),
    ("cli.serve", "serving.service"),
    ("measure.plotting", "measure.plots"),
}
LAZY_OUTSIDE = {
    ("cli.benchmark", "torch"),
    ("cli.info", "torch"),
    ("cli.info", "transformers"),
    ("cli.generate", "transformers"),
    ("cli.loading", "huggingface_hub"),
    ("cli.loading", "torch"),
    ("cli.loading", "transformers"),
    ("cli.serve", "fastapi"),
    ("cli.serve", "uvicorn"),
    ("cli.launch", "accelerate"),
    ("cli.launch", "transformers"),
    ("discovery.hub_datasets", "datasets"),
    ("discovery.text", "pyarrow"),
    ("discovery.clustering", "sklearn"),
    ("discovery.grouping", "scipy"),
    ("discovery.grouping", "sklearn"),
    ("healing.adapters", "peft"),
    ("modeling.adapting", "peft"),
}


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def _is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _imports(node, inside=False):
    """Yield ``(imported module, whether in a function)``, without what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((name, inside) for name in _imported_from(child))
        elif _is_type_checking(child):
            yield from _imports(ast.Module(body=child.orelse, type_ignores=[]), inside)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, inside or function)


def _imported_from(node):
    assert node.level == 0, "relative import"
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole.removeprefix(f"{PACKAGE}.") in MODULES else node.module


def _imports_of(module):
    return list(_imports(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def _inner(name):
    return name.removeprefix(PACKAGE).removeprefix(".")


def _is_inner(name):
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _level(module):
    return LEVELS[module.split(".")[0]]


def test_every_module_has_its_place():
    assert {module.split(".")[0] for module in MODULES} - {""} == set(LEVELS)


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_follow_the_data(module):
    inner = [_inner(name) for name, inside in _imports_of(module) if _is_inner(name) and not inside]
    assert "" not in inner, "a module imports the package itself"
    against = [name for name in inner if _level(name) > _level(module)]
    assert against == []


def test_the_package_itself_imports_its_version_only():
    names = [(_inner(name), inside) for name, inside in _imports_of("") if _is_inner(name)]
    assert names == [("version", False)]


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {
        module: {_inner(n) for n, inside in _imports_of(module) if _is_inner(n) and not inside}
        for module in MODULES
    }
    done: list[str] = []
    while len(done) < len(graph):
        ready = [module for module in graph if module not in done and graph[module] <= {*done}]
        assert ready, f"a circle among {sorted(set(graph) - set(done))}"
        done.extend(ready)


def test_imports_in_functions_are_the_listed_ones():
    inner, outside = set(), set()
    for module in MODULES:
        for name, inside in _imports_of(module):
            if inside and _is_inner(name):
                inner.add((module, _inner(name)))
            elif inside:
                outside.add((module, name.split(".")[0]))
    assert inner == LAZY
    assert outside == LAZY_OUTSIDE


HEAVY_MODULES = {
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "datasets",
    "matplotlib",
    "sklearn",
}


def test_no_command_imports_anything_heavy():
    for module in [name for name in MODULES if name.split(".")[0] == "cli"]:
        tops = {name.split(".")[0] for name, inside in _imports_of(module) if not inside}
        assert not tops & HEAVY_MODULES, module


def test_every_public_name_exists_and_is_listed():
    for name in hf_sparse_pathways.__all__:
        assert getattr(hf_sparse_pathways, name) is not None
    assert dir(hf_sparse_pathways) == sorted(hf_sparse_pathways.__all__)
    assert not hasattr(hf_sparse_pathways, "no_such_name")


def _run(code):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:hf_sparse_pathways", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT.parent,
    )


HEAVY = "[n for n in ('torch', 'transformers', 'numpy', 'safetensors') if n in sys.modules]"
KNOWS = "assert 'sparse_pathways' in CONFIG_MAPPING; AutoConfig.for_model"
SCRIPTS = {
    "ours first": f"""
import sys
import hf_sparse_pathways
assert {HEAVY} == [], {HEAVY}
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
{KNOWS}
from hf_sparse_pathways import SparsePathwaysConfig
assert CONFIG_MAPPING['sparse_pathways'] is SparsePathwaysConfig
""",
    "transformers first": f"""
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert 'sparse_pathways' not in CONFIG_MAPPING
import hf_sparse_pathways
{KNOWS}
""",
    "transformers bare": f"""
import transformers
import hf_sparse_pathways
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers import AutoConfig
{KNOWS}
""",
}


@pytest.mark.parametrize("order", SCRIPTS)
def test_importing_registers_the_model_type_silently(order):
    ran = _run(SCRIPTS[order])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
