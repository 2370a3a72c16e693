"""Models that hold one domain's neurons only: ``from_pretrained(folder, domain="code")``.

The base's own loading runs, on a model whose FFN leaves were given the kept shapes before and with
lazy excerpts (``ffn/ranges.py``) in place of their tensors; the compensation is then added into the
weights and the swapped leaves are ordinary ones again. A leaf whose tensors are converted on the
way, or come from files other than safetensors, is loaded whole and cut afterwards.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.ffn.expert_reduction import ReducedExperts, reduce_experts
from hf_sparse_pathways.ffn.ranges import Excerpt
from hf_sparse_pathways.ffn.reduction import ReducedBlock
from hf_sparse_pathways.modeling.partial_experts import reserve_experts
from hf_sparse_pathways.modeling.sources import find_sources
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from hf_sparse_pathways.modeling.model import SparsePathwaysModel

HOW_TO_LOAD_ALL = "Load the full model, from_pretrained(...) without domain=, "


@dataclass(frozen=True)
class Partial:
    """What a model that holds one domain's neurons says of itself.

    Attributes:
        domain: The domain.
    """

    domain: str

    def check(self, domain: Any) -> None:
        """Check that a call asks for this domain, in whatever way.

        Raises:
            PathwaysError: It asks for another one, or for the dense model.
        """
        names = domain if isinstance(domain, list | tuple) else [domain]
        if isinstance(domain, Tensor):
            names = [self.domain if index == 0 else None for index in domain.flatten().tolist()]
        for name in names:
            if name != self.domain:
                raise PathwaysError(
                    f"This model was loaded with the neurons of {self.domain!r} only, so it cannot "
                    f"compute {'the dense model' if name is None else repr(name)}. "
                    f"{HOW_TO_LOAD_ALL}to choose at each call."
                )

    def refuse(self, what: str) -> PathwaysError:
        """Return the error of something that needs all neurons."""
        return PathwaysError(
            f"This model was loaded with the neurons of {self.domain!r} only: {what}. "
            f"{HOW_TO_LOAD_ALL}for that."
        )


class Loading:
    """One partial load, from the model's making to its last weight."""

    def __init__(self, pathways: Pathways, domain: str) -> None:
        """Choose what to load.

        Raises:
            UnknownNameError: There is no such domain.
        """
        if not isinstance(domain, str):
            raise UnknownNameError("domain", domain, pathways.domains)
        self._chosen = pathways.subset([domain])
        self._parts = self._chosen[domain].unclustered(
            domain, f"Tokens may need any of a block's neurons. {HOW_TO_LOAD_ALL}instead."
        )
        self.domain = domain
        self._blocks: list[ReducedBlock] = []
        self._experts: list[ReducedExperts] = []
        self._files: list[Any] = []

    def prepare(
        self, model: "SparsePathwaysModel", state: Any, files: Any, config: Any
    ) -> dict[str, Any] | None:
        """Give a model's leaves the kept shapes, in place; return what is loaded into them.

        Args:
            model: The model, without weights yet.
            state: Tensors by name, if that is what is loaded; else None.
            files: Checkpoint files.
            config: Transformers' ``LoadStateDictConfig``.

        Returns:
            Tensors by name, lazy ones; None where the files have to be loaded whole.

        Raises:
            MismatchError: The pathways were made for another model.
            UnsupportedModelError: Partial loading does not go together with what was asked.
        """
        self._chosen.base.check_same(model._shape)
        _check_supported(config)
        attached = model._attachment.blocks
        for one, part in zip(attached, self._parts, strict=True):
            one.block.check_leaves(part)
        model._attachment.detach()
        self._blocks = [
            ReducedBlock(one.block, part) for one, part in zip(attached, self._parts, strict=True)
        ]
        routed = model._attachment.copies.experts
        kept = self._chosen[self.domain].experts
        self._experts = [
            reduce_experts(one.found, own) for one, own in zip(routed, kept, strict=bool(kept))
        ]
        model._attachment.copies.reduce([one.block.leaves for one in attached])
        _check_own_weights(model, self._blocks)
        if state is None and not all(str(file).endswith(".safetensors") for file in files or [""]):
            return None
        if state is not None:
            return dict(state)
        whole: dict[str, Any] = {}
        read: dict[str, Any] = {}
        for file in files:
            whole |= self._lazy(file, "pread" if _must_read(config) else "mmap")
            read |= self._lazy(file, "pread")
        excerpts = self._excerpts(model, read, config)
        unneeded = reserve_experts(model, self._experts, read, config, excerpts)
        return {
            name: tensor for name, tensor in {**whole, **excerpts}.items() if name not in unneeded
        }

    def _lazy(self, file: str, backend: str) -> dict[str, Any]:
        opened: Any = safe_open(file, framework="pt", device="cpu", backend=backend)
        self._files.append(opened)
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118

    def _excerpts(self, model: nn.Module, read: dict[str, Any], config: Any) -> dict[str, Excerpt]:
        """Return an excerpt for each tensor that becomes one leaf's parameter as it is."""
        sources = find_sources(model, list(read), config.weight_mapping or [])
        names = {id(p): n for n, p in model.state_dict(keep_vars=True).items()}
        excerpts = {}
        for block in self._blocks:
            for leaf, name, dim, runs in block.parameters():
                whole = leaf.get_parameter(name)
                found = sources.get(names[id(whole)], [])
                if len(found) != 1 or list(read[found[0]].get_shape()) != list(whole.shape):
                    continue  # converted on the way, missing or of another shape: cut afterwards
                block.reserve(leaf, name, dim, runs)
                dtype = None if config.dtype_plan else whole.dtype
                excerpts[found[0]] = Excerpt(read[found[0]], dim, runs, dtype)
        return excerpts

    def finish(self, model: "SparsePathwaysModel") -> None:
        """Add the compensation into a loaded model's weights, in place."""
        for block in self._blocks:
            block.finish()
        for layer in self._experts:
            layer.finish()
        for opened in self._files:
            opened.__exit__(None, None, None)
        model.become_partial(Partial(self.domain))
        self._blocks, self._experts = [], []


class _Local(threading.local):
    loading: Loading | None = None


_LOCAL = _Local()


def current_loading() -> Loading | None:
    """Return the partial load that this thread is in, if it is in one."""
    return _LOCAL.loading


@contextmanager
def partial_load(loading: Loading | None) -> Iterator[None]:
    """Within the block, a model that this thread loads is loaded in part."""
    before, _LOCAL.loading = _LOCAL.loading, loading
    try:
        yield
    finally:
        _LOCAL.loading = before


def _check_supported(config: Any) -> None:
    """Check how a model is loaded.

    Raises:
        UnsupportedModelError: The weights do not come as they are to one place.
    """
    places = set((config.device_map or {}).values())
    problem = {
        "quantisation": config.hf_quantizer is not None,
        "tensor parallelism": config.device_mesh is not None,
        "a device_map with 'disk'": "disk" in places,
    }
    for what, given in problem.items():
        if given:
            raise UnsupportedModelError(
                f"domain= loads one domain's neurons only, which does not go together with {what}. "
                f"{HOW_TO_LOAD_ALL}or leave that out."
            )


def _check_own_weights(model: Any, blocks: list[ReducedBlock]) -> None:
    """Check that no weights are shared, which would have to be cut in two ways.

    Raises:
        UnsupportedModelError: Some are.
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    tied_names = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*tied_names.keys(), *tied_names.values()}
    shared = {id(p) for n, p in model.state_dict(keep_vars=True).items() if n in tied}
    for block in blocks:
        for leaf, name, *_ in block.parameters():
            parameter = leaf.get_parameter(name)
            if uses[id(parameter)] > 1 or id(parameter) in shared:
                raise UnsupportedModelError(
                    f"{block.block.name} shares its weights with another module, so they cannot be "
                    f"loaded in part. {HOW_TO_LOAD_ALL}instead."
                )


def _must_read(config: Any) -> bool:
    return bool(config.disable_mmap) or sys.platform == "win32"
