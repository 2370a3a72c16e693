"""Run a Hugging Face causal LM with only the FFN neurons that a domain needs.

Importing the package registers the ``sparse_pathways`` model type with the auto classes. Nothing
heavy is imported for that: the public names load on first use, and the registration waits until
Transformers itself loads its auto classes.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from hf_sparse_pathways.version import __version__

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.clustering import Clustering
    from hf_sparse_pathways.discovery.expansion import expand
    from hf_sparse_pathways.discovery.grouping import Grouping
    from hf_sparse_pathways.discovery.profiles import Profile
    from hf_sparse_pathways.discovery.profiling import profile
    from hf_sparse_pathways.discovery.selection import select
    from hf_sparse_pathways.errors import PathwaysError
    from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
    from hf_sparse_pathways.ffn.clusters import ClusteredBlock, TokenRouter
    from hf_sparse_pathways.ffn.kept_experts import KeptExperts
    from hf_sparse_pathways.ffn.neuron_groups import NeuronGroups
    from hf_sparse_pathways.healing.distilling import EndToEnd
    from hf_sparse_pathways.healing.healing import Healed, heal
    from hf_sparse_pathways.healing.reconstruction import Reconstruction
    from hf_sparse_pathways.healing.router_report import TrainedRouters
    from hf_sparse_pathways.healing.router_settings import RouterSettings
    from hf_sparse_pathways.healing.router_training import train_routers
    from hf_sparse_pathways.healing.settings import HealingSettings
    from hf_sparse_pathways.measure.distillation import Distilled, distil
    from hf_sparse_pathways.measure.gating import Gates, read_gates, swap_effect, swap_gates
    from hf_sparse_pathways.measure.plotting import plot
    from hf_sparse_pathways.measure.quality import evaluate
    from hf_sparse_pathways.measure.routed_experts import summarise_experts
    from hf_sparse_pathways.measure.speed.benchmarking import benchmark
    from hf_sparse_pathways.modeling.adaptation import adapt
    from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
    from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig
    from hf_sparse_pathways.modeling.permutation import permute
    from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
    from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN
    from hf_sparse_pathways.sgatlin.settings import (
        MlpConfig,
        MoeConfig,
        PeerConfig,
        SgatlinConfig,
        SwigluConfig,
    )
    from hf_sparse_pathways.share.card import CardSettings
    from hf_sparse_pathways.share.domains import add_domains, remove_domains, rename_domain
    from hf_sparse_pathways.share.exporting import Export, export
    from hf_sparse_pathways.share.page import write_html_report
    from hf_sparse_pathways.share.pushing import push_folder

__all__ = [
    "BlockPathway",
    "CardSettings",
    "ClusteredBlock",
    "Clustering",
    "Distilled",
    "EndToEnd",
    "Export",
    "Gates",
    "Grouping",
    "Healed",
    "HealingSettings",
    "KeptExperts",
    "LowRank",
    "MlpConfig",
    "MoeConfig",
    "NeuronGroups",
    "Pathway",
    "Pathways",
    "PathwaysError",
    "PeerConfig",
    "Profile",
    "Reconstruction",
    "RouterSettings",
    "SgatlinConfig",
    "SgatlinFFN",
    "SparsePathwaysConfig",
    "SparsePathwaysForCausalLM",
    "SwigluConfig",
    "TokenRouter",
    "TrainedRouters",
    "__version__",
    "adapt",
    "add_domains",
    "benchmark",
    "distil",
    "evaluate",
    "expand",
    "export",
    "heal",
    "permute",
    "plot",
    "profile",
    "push_folder",
    "read_gates",
    "remove_domains",
    "rename_domain",
    "select",
    "summarise_experts",
    "swap_effect",
    "swap_gates",
    "train_routers",
    "write_html_report",
]

_HOMES = {
    "PathwaysError": "errors",
    "MlpConfig": "sgatlin.settings",
    "MoeConfig": "sgatlin.settings",
    "PeerConfig": "sgatlin.settings",
    "SgatlinConfig": "sgatlin.settings",
    "SgatlinFFN": "sgatlin.linear_experts",
    "SwigluConfig": "sgatlin.settings",
    "BlockPathway": "ffn.block_pathway",
    "ClusteredBlock": "ffn.clusters",
    "KeptExperts": "ffn.kept_experts",
    "LowRank": "ffn.block_pathway",
    "NeuronGroups": "ffn.neuron_groups",
    "TokenRouter": "ffn.clusters",
    "Pathway": "pathways.pathway",
    "Pathways": "pathways.pathway",
    "Profile": "discovery.profiles",
    "adapt": "modeling.adaptation",
    "SparsePathwaysConfig": "modeling.configuration",
    "SparsePathwaysForCausalLM": "modeling.causal_lm",
    "Healed": "healing.healing",
    "HealingSettings": "healing.settings",
    "RouterSettings": "healing.router_settings",
    "TrainedRouters": "healing.router_report",
    "train_routers": "healing.router_training",
    "benchmark": "measure.speed.benchmarking",
    "evaluate": "measure.quality",
    "EndToEnd": "healing.distilling",
    "Reconstruction": "healing.reconstruction",
    "Distilled": "measure.distillation",
    "distil": "measure.distillation",
    "Gates": "measure.gating",
    "read_gates": "measure.gating",
    "summarise_experts": "measure.routed_experts",
    "swap_effect": "measure.gating",
    "swap_gates": "measure.gating",
    "plot": "measure.plotting",
    "heal": "healing.healing",
    "permute": "modeling.permutation",
    "Clustering": "discovery.clustering",
    "Grouping": "discovery.grouping",
    "expand": "discovery.expansion",
    "profile": "discovery.profiling",
    "select": "discovery.selection",
    "CardSettings": "share.card",
    "Export": "share.exporting",
    "add_domains": "share.domains",
    "export": "share.exporting",
    "push_folder": "share.pushing",
    "remove_domains": "share.domains",
    "rename_domain": "share.domains",
    "write_html_report": "share.page",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register(_: ModuleType) -> None:
    import_module(f"{__name__}.modeling.configuration")


wrapt.register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
