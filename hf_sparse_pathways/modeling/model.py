"""A causal LM with pathways: the base's own class, derived from once more.

``SparsePathwaysLlamaForCausalLM`` derives from ``SparsePathwaysForCausalLM`` and
``LlamaForCausalLM``, and so for every architecture; the classes are made when first needed and
registered with the auto classes. Building one swaps the leaves of its FFN blocks (``ffn``), and
``forward`` and ``generate`` put the chosen domain on the calling thread's stack of choices while
the base's own code runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.choices import (
    CheckpointedChoices,
    Choice,
    find_choice,
)
from hf_sparse_pathways.ffn.copies import WHOLE, Key
from hf_sparse_pathways.ffn.execution import Execution, check_executor
from hf_sparse_pathways.ffn.executors import EXECUTORS, OWN_DENSE
from hf_sparse_pathways.ffn.rest import REST
from hf_sparse_pathways.memory import format_memory, parse_memory
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig, config_class_for
from hf_sparse_pathways.modeling.domains import Unset, fit_rows, resolve_domain
from hf_sparse_pathways.modeling.grouping import group_rows
from hf_sparse_pathways.modeling.partial import (
    HOW_TO_LOAD_ALL,
    Loading,
    Partial,
    current_loading,
    partial_load,
)
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel as _Base
else:
    _Base = object

Domain = str | Sequence[str | None] | Tensor | None

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


class SparsePathwaysModel(_Base):
    """What every model with pathways can do, whatever its head."""

    config: Any
    _attachment: Attachment
    _pathways: Pathways | None
    _shape: BaseModel
    _partial: Partial | None = None

    def __init__(self, config: SparsePathwaysConfig, *args: Any, **kwargs: Any) -> None:
        """Build the base model and swap its FFN leaves; pathways are given afterwards."""
        super().__init__(config, *args, **kwargs)
        self._pathways = None
        self._shape = BaseModel.of(self)
        self._attachment = Attachment(self)

    # -- pathways ---------------------------------------------------------------------------

    @property
    def pathways(self) -> Pathways:
        """The pathways in use.

        Raises:
            PathwaysError: None were given yet, or one domain's neurons were loaded alone.
        """
        if self._partial is not None:
            raise self._partial.refuse("its pathway is part of the weights now")
        if self._pathways is None:
            raise PathwaysError(
                "This model has no pathways yet. Load it with from_pretrained, or give it some "
                "with model.set_pathways(pathways)."
            )
        return self._pathways

    def set_pathways(self, pathways: Pathways) -> None:
        """Use other pathways from now on, in place.

        Raises:
            MismatchError: They were made for a model of another shape.
            UnknownNameError: The default domain is not among them.
            PathwaysError: One domain's neurons were loaded alone.
        """
        if self._partial is not None:
            raise self._partial.refuse("other pathways need other neurons")
        pathways.base.check_same(self._shape)  # adapters may have changed the modules since
        self.config.check_default_domain(pathways.domains)
        named = [*pathways.by_domain.values(), *pathways.controls.values()]
        self._attachment.load([pathway.blocks for pathway in named])
        self._pathways = pathways
        self.config.domains = pathways.domains
        self._limit_copies()

    def become_partial(self, partial: Partial) -> None:
        """Note that one domain's neurons were loaded alone, in place."""
        self._partial = partial
        self.config.domains, self.config.default_domain = [partial.domain], partial.domain
        self._limit_copies()

    def _limit_copies(self) -> None:
        """Let copies take as much as the weights, if nothing else was said."""
        if self._attachment.residents.limit is None:
            sizes = (p.numel() * p.element_size() for p in self.parameters())
            self._attachment.residents.limit = sum(sizes)

    @property
    def domains(self) -> list[str]:
        """The names that ``domain=`` takes."""
        if self._partial is not None:
            return [self._partial.domain]
        return [] if self._pathways is None else self._pathways.domains

    def set_executor(self, executor: str) -> None:
        """Choose how kept neurons are computed: ``"auto"`` or a name in ``EXECUTORS``, in place.

        A model of which one domain's neurons were loaded alone computes them whatever the executor.

        Raises:
            UnknownNameError: There is no such executor.
        """
        check_executor(executor)
        self.config.executor = executor
        self._attachment.reset()

    @property
    def execution(self) -> Execution:
        """Which executor computes kept neurons now, and why."""
        self._attachment.settle()
        return self._attachment.execution(self.config.executor)

    @property
    def max_resident_bytes(self) -> int:
        """Most bytes that copies of kept weights take; by default the bytes of all weights.

        Where a pathway does not fit, others that were used longer ago give way; if it does not
        fit alone, or because other threads are using theirs, it is computed by ``masked``.
        """
        limit = self._attachment.residents.limit
        assert limit is not None  # from the start: see set_pathways
        return limit

    @max_resident_bytes.setter
    def max_resident_bytes(self, size: int | str) -> None:
        self._attachment.residents.limit = parse_memory(size)
        self._attachment.copies.drop()

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of the copies by pathway, those used longest ago first."""
        names = {WHOLE: "dense", REST: "attention and head", **dict(enumerate(self._named))}

        def name(key: Key) -> str:
            return "+".join(names[one] for one in (key if isinstance(key, tuple) else (key,)))

        return {name(key): size for key, size in self._attachment.residents.sizes.items()}

    def prepare(self, domain: str) -> bool:
        """Make the copies that a domain's first call would make, ahead of it.

        Args:
            domain: A domain.

        Returns:
            Whether they are there. They are not where other threads are using the memory, and
            where none are needed: by ``masked``, and where one domain's neurons were loaded alone.

        Raises:
            UnknownNameError: An unknown domain.
            PathwaysError: They would take more than ``max_resident_bytes``.
        """
        pathway = self._resolve(domain)
        if not isinstance(pathway, int):
            raise PathwaysError(f"prepare takes one domain, got {domain!r}.")
        self._look_at_weights()
        if self.execution.executor == "masked":
            return False
        needed = self._attachment.copies.size(pathway)
        if needed > self.max_resident_bytes:
            raise PathwaysError(
                f"The kept weights of {domain!r} take {format_memory(needed)}, and "
                f"max_resident_bytes is {format_memory(self.max_resident_bytes)}. Raise it "
                "(model.max_resident_bytes = ...), or let 'masked' compute this domain."
            )
        residents = self._attachment.residents
        if not residents.pin(pathway):
            return False
        try:
            self._attachment.copies.make(pathway, EXECUTORS[self.execution.executor].form)
        finally:
            residents.unpin(pathway)
        return True

    def group_by_domain(self, domains: Sequence[str | None], *, max_batch: int) -> list[list[int]]:
        """Group waiting requests into the batches that run fastest; see ``modeling.grouping``.

        Args:
            domains: Each request's domain, None for dense.
            max_batch: Most rows of a batch.

        Returns:
            Batches of indices into ``domains``. A batch of several domains is run with
            ``domain=[...]``, one per row.

        Raises:
            UnknownNameError: An unknown domain.
            PathwaysError: ``max_batch`` is not positive.
        """
        if domains:
            self._resolve([*domains])
        return group_rows(domains, max_batch)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; copies of kept weights are dropped, since training changes weights."""
        self._attachment.copies.drop()
        return super().train(mode)

    @contextmanager
    def pathway(self, domain: Domain) -> Iterator[Self]:
        """Within the block, calls on this thread that name no domain use this one.

        Coroutines on one thread share its scopes: pass ``domain=`` there instead.

        Args:
            domain: A domain, a list with one per row, or None for dense.

        Raises:
            UnknownNameError: An unknown domain.
        """
        with self._holding(self._resolve(domain), expand=False):
            yield self

    @contextmanager
    def _holding(self, chosen: int | Tensor | None, *, expand: bool) -> Iterator[None]:
        """Make a choice for all passes on this thread within the block."""
        if chosen is not None or self.config.executor in OWN_DENSE:
            self._look_at_weights()
        compiled = hasattr(self.forward, "_torchdynamo_orig_callable") or self._compiled_call_impl
        name = self.config.executor
        choice = self._attachment.hold(chosen, name, plain=bool(compiled), expand=expand)
        try:
            yield
        finally:
            self._attachment.end(choice)

    def _resolve(self, domain: Domain) -> int | Tensor | None:
        """Resolve names to indices; controls come after the domains."""
        if self._partial is not None:
            self._partial.check(domain)
        controls = [] if self._pathways is None else list(self._pathways.controls)
        return resolve_domain(domain, self.domains, controls)

    @property
    def _named(self) -> list[str]:
        """Names of all pathways, in the order of their indices."""
        return [] if self._pathways is None else [*self.domains, *self._pathways.controls]

    # -- forward ----------------------------------------------------------------------------

    def _chosen(self, domain: Domain | Unset) -> tuple[int | Tensor | None, bool]:
        """Return what a call that names ``domain`` computes, and whether its rows may expand."""
        if not isinstance(domain, Unset):
            return self._resolve(domain), False
        ambient = find_choice(self._attachment.key)
        if ambient is None:
            return self._resolve(self.config.default_domain), False
        if ambient.pathway is None and self._partial is not None:
            self._partial.check(None)
        return ambient.pathway, ambient.expand

    def enter_forward(
        self, domain: Domain | Unset, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Choice:
        """Make the choice for one forward pass; ``leave_forward`` takes it back."""
        chosen, expand = self._chosen(domain)
        if isinstance(chosen, Tensor):
            chosen = fit_rows(chosen, batch_size(args, kwargs), expand=expand)
        if isinstance(chosen, Tensor):
            chosen = chosen.to(self.device)
        # generate has looked at the weights, for all its steps
        return self._attachment.begin(chosen, self.config.executor, looked=expand)

    def leave_forward(self, choice: Choice) -> None:
        """Take back what ``enter_forward`` did."""
        self._attachment.end(choice)

    def _look_at_weights(self) -> None:
        """Notice what has become of the leaves and their weights since the last call."""
        self._attachment.settle()
        if self.config.executor != "masked":
            self._attachment.copies.check()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Set it as the base does, with a function under which recomputation keeps the choice."""
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = CheckpointedChoices(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    # -- saving and loading -----------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: "str | PathLike[str]",
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save weights, configuration and pathways; see the base for the other arguments.

        Raises:
            PathwaysError: There are no pathways, or one domain's neurons were loaded alone.
        """
        pathways = self.pathways
        names = ("repo_id", "commit_message", "private", "revision", "create_pr")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            pathways.save_pretrained(save_directory)
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub, token=kwargs.get("token"))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say what the base says: checkpoint conversion and initialisation depend on it."""
        base: Any = cls.__bases__[-1]
        return bool(base.is_custom_code())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | PathLike[str]",
        *args: Any,
        pathways: "Pathways | str | PathLike[str] | None" = None,
        executor: str | None = None,
        default_domain: str | None = None,
        max_resident_bytes: int | str | None = None,
        domain: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load weights, configuration and pathways.

        Args:
            pretrained_model_name_or_path: A folder or Hub id that holds the weights.
            args: As the base's.
            pathways: Pathways, or the folder or Hub id that holds them; by default they are
                beside the weights.
            executor: How kept neurons are computed; by default as saved.
            default_domain: The domain when ``domain`` is omitted; by default as saved.
            max_resident_bytes: Most bytes of copies of kept weights, also as ``"2GB"``.
            domain: Load this domain's neurons alone. The model then has no other domain and no
                dense form, cannot be saved, and takes the memory of what is kept.
            kwargs: As the base's.

        Raises:
            ArtefactError: There are no pathways, or they are corrupt or of a newer format.
            MismatchError: They were made for another model.
        """
        check_executor(executor or "auto")
        pathways = _read_pathways(pathways, pretrained_model_name_or_path, domain, kwargs)
        loading = None if domain is None else Loading(pathways, domain)
        if loading is not None and default_domain not in (None, domain):
            raise Partial(loading.domain).refuse(f"default_domain={default_domain!r} is another")
        with partial_load(loading):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if default_domain is not None:
            model.config.default_domain = default_domain
        if loading is None:
            model.set_pathways(pathways)
        elif model._partial is None:
            raise UnsupportedModelError(
                "This version of transformers loads models in a way in which they cannot be loaded "
                f"in part. {HOW_TO_LOAD_ALL}instead."
            )
        if executor is not None:
            model.set_executor(executor)
        if max_resident_bytes is not None:
            model.max_resident_bytes = max_resident_bytes
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any
    ) -> Any:
        """Load as the base does, in part if that is what this thread is doing."""
        loading = current_loading()
        if loading is not None:
            state_dict = loading.prepare(model, state_dict, checkpoint_files, load_config)
        load = PreTrainedModel._load_pretrained_model
        return load(model, state_dict, checkpoint_files, load_config, *args)

    @staticmethod
    def _finalize_model_loading(model: Any, *args: Any) -> Any:
        """Finish as the base does, and fold the pathway into weights that were loaded in part."""
        info = PreTrainedModel._finalize_model_loading(model, *args)
        loading = current_loading()
        if loading is not None:
            loading.finish(model)
        return info

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the base's class, since the derived one is made at run time."""
        own = type(self.config).__bases__[1]
        return _new_model, (type(self).__bases__[1], own), self.__dict__


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the rows of a call's main input; 1 without any, as ``generate`` starts from BOS."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    for value in (*args[:1], *named):
        if isinstance(value, Tensor):
            return int(value.shape[0])
    return 1


def _read_pathways(
    pathways: "Pathways | str | PathLike[str] | None",
    beside: "str | PathLike[str]",
    only: str | None,
    kwargs: dict[str, Any],
) -> Pathways:
    """Return pathways as given, from their own place, or from beside the weights."""
    if isinstance(pathways, Pathways):
        return pathways
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    if pathways is None:
        return Pathways.from_pretrained(beside, only=only, **hub)
    for name in ("revision", "subfolder"):  # those of the weights' repository
        hub.pop(name, None)
    return Pathways.from_pretrained(pathways, only=only, **hub)


def made_class(base: type[PreTrainedModel], config_class: type[SparsePathwaysConfig]) -> Any:
    """Return the class with pathways of a base's class."""
    from hf_sparse_pathways.modeling.classes import model_class_for

    return model_class_for(base, config_class)


def _new_model(base: type[PreTrainedModel], config_base: type[PreTrainedConfig]) -> Any:
    made = made_class(base, config_class_for(config_base))
    return made.__new__(made)
