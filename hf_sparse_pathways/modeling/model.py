"""A causal LM with pathways: the base's own class, derived from once more.

``SparsePathwaysLlamaForCausalLM`` derives from ``SparsePathwaysForCausalLM`` and
``LlamaForCausalLM``, and so for every architecture; the classes are made when first needed and
registered with the auto classes. Building one swaps the leaves of its FFN blocks (``ffn``), and
``forward`` and ``generate`` put the chosen domain on the calling thread's stack of choices while
the base's own code runs.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
)

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.choices import (
    CheckpointedChoices,
    find_choice,
    push_choice,
    restore_choices,
)
from hf_sparse_pathways.ffn.executors import resolve_executor
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig, config_class_for
from hf_sparse_pathways.modeling.domains import UNSET, Unset, fit_rows, resolve_domain
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel as _Base
else:
    _Base = object

Domain = str | Sequence[str | None] | Tensor | None

CLASS_PREFIX = "SparsePathways"

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

    def __init__(self, config: SparsePathwaysConfig, *args: Any, **kwargs: Any) -> None:
        """Build the base model and swap its FFN leaves; pathways are given afterwards."""
        super().__init__(config, *args, **kwargs)
        self._pathways = None
        self._attachment = Attachment(self)

    # -- pathways ---------------------------------------------------------------------------

    @property
    def pathways(self) -> Pathways:
        """The pathways in use.

        Raises:
            PathwaysError: None were given yet.
        """
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
        """
        pathways.check_fits(self)
        named = [*pathways.by_domain.values(), *pathways.controls.values()]
        self._attachment.load([pathway.keep for pathway in named])
        self._pathways = pathways
        self.config.domains = pathways.domains
        self.config.check_default_domain()

    @property
    def domains(self) -> list[str]:
        """The names that ``domain=`` takes."""
        return [] if self._pathways is None else self._pathways.domains

    def set_executor(self, executor: str) -> None:
        """Choose how kept neurons are computed: ``"auto"`` or a name in ``EXECUTORS``, in place.

        Raises:
            UnknownNameError: There is no such executor.
        """
        resolve_executor(executor)
        self.config.executor = executor
        self._attachment.drop_copies()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; copies of kept weights are dropped, since training changes weights."""
        self._attachment.drop_copies()
        return super().train(mode)

    @contextmanager
    def pathway(self, domain: Domain) -> Iterator[Self]:
        """Within the block, calls on this thread that name no domain use this one.

        Args:
            domain: A domain, a list with one per row, or None for dense.

        Raises:
            UnknownNameError: An unknown domain.
        """
        self._attachment.settle()
        previous = push_choice(self._attachment.key, self._resolve(domain))
        try:
            yield self
        finally:
            restore_choices(previous)

    def _resolve(self, domain: Domain) -> int | Tensor | None:
        """Resolve names to indices; controls come after the domains."""
        named = [] if self._pathways is None else [*self.domains, *self._pathways.controls]
        return resolve_domain(domain, named)

    # -- forward ----------------------------------------------------------------------------

    def _enter(self, domain: Domain | Unset, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Push the choice for one forward pass; return the previous head."""
        expand = False
        if isinstance(domain, Unset):
            ambient = find_choice(self._attachment.key)
            if ambient is None:
                chosen = self._resolve(self.config.default_domain)
            else:
                chosen, expand = ambient.pathway, ambient.expand
        else:
            chosen = self._resolve(domain)
        if isinstance(chosen, Tensor):
            chosen = fit_rows(chosen, _batch_size(args, kwargs), expand=expand)
        if isinstance(chosen, Tensor):
            chosen = chosen.to(self.device)
        executor = "masked"
        if chosen is not None:
            self._attachment.settle()
            if not torch.is_grad_enabled():  # copies carry no gradient, masks do
                executor = resolve_executor(self.config.executor)
        return push_choice(self._attachment.key, chosen, executor=executor)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Set it as the base does, with a function under which recomputation keeps the choice."""
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = CheckpointedChoices(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    # -- saving and loading -----------------------------------------------------------------

    def save_pretrained(
        self, save_directory: "str | PathLike[str]", push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save weights, configuration and pathways; see the base for the other arguments."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            self.pathways.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

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
        **kwargs: Any,
    ) -> Any:
        """Load weights, configuration and pathways.

        Args:
            pretrained_model_name_or_path: A folder or Hub id that holds the weights.
            args: As the base's.
            pathways: Pathways, or the folder or Hub id that holds them; by default they are
                beside the weights.
            executor: How kept neurons are computed; by default as saved.
            kwargs: As the base's.

        Raises:
            ArtefactError: There are no pathways, or they are corrupt or of a newer format.
            MismatchError: They were made for another model.
        """
        pathways = _read_pathways(pathways, pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_pathways(pathways)
        if executor is not None:
            model.set_executor(executor)
        return loaded

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the base's class, since the derived one is made at run time."""
        own = type(self.config).__bases__[1]
        return _new_model, (type(self).__bases__[1], own), self.__dict__


class SparsePathwaysForCausalLM(SparsePathwaysModel):
    """A causal LM of any architecture with pathways.

    Called on this class itself, ``from_dense`` and ``from_pretrained`` return an instance of the
    class made for the model's architecture.
    """

    @classmethod
    def from_dense(
        cls,
        model: PreTrainedModel,
        pathways: Pathways,
        *,
        executor: str = "auto",
        default_domain: str | None = None,
    ) -> Any:
        """Return a model with pathways that shares a dense model's parameters. Pure.

        Args:
            model: A causal LM; it stays dense, and later changes of its weights are seen by both.
            pathways: Pathways that were made for it.
            executor: How kept neurons are computed.
            default_domain: The domain when ``domain`` is omitted; None for dense.

        Raises:
            MismatchError: The pathways were made for another model.
            UnsupportedModelError: It is no causal LM of Transformers, or already dispatched.
            UnknownNameError: Unknown executor or default domain.
        """
        resolve_executor(executor)
        pathways.check_fits(model)
        _check_convertible(model)
        config = SparsePathwaysConfig.from_base(
            model.config,
            domains=pathways.domains,
            default_domain=default_domain,
            executor=executor,
        )
        sparse = _copy_structure(model, {id(model.config): config})
        sparse.__class__ = model_class_for(type(model), type(config))
        sparse._attachment = Attachment(sparse)
        sparse.set_pathways(pathways)
        return sparse

    def to_dense(self) -> PreTrainedModel:
        """Return a plain model of the base's class that shares this one's parameters. Pure.

        Raises:
            UnsupportedModelError: An adapter wraps a leaf, or the model is dispatched.
        """
        _check_undispatched(self)
        base_config = self.config.base_config
        dense = _copy_structure(self, {id(self.config): base_config, id(self._pathways): None})
        dense._attachment.detach()
        del dense._attachment, dense._pathways
        dense.__class__ = type(self).__bases__[1]
        return dense

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | PathLike[str]",
        *args: Any,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model with pathways, or a base model with ``pathways=`` from elsewhere.

        Args:
            pretrained_model_name_or_path: A folder or Hub id that holds the weights.
            args: As the base's.
            config: Configuration to use instead of the saved one.
            kwargs: ``pathways`` (Pathways, a folder or a Hub id; needed when the weights are those
                of a plain base), ``executor``, and everything that Transformers takes.

        Raises:
            ArtefactError: There are no pathways, or they are corrupt or of a newer format.
            MismatchError: They were made for another model.
        """
        if cls is not SparsePathwaysForCausalLM:
            return super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, **kwargs
            )
        if config is None:
            names = (*HUB_ARGUMENTS, "gguf_file")
            chosen = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **chosen)
        if not isinstance(config, SparsePathwaysConfig):
            config = SparsePathwaysConfig.from_base(config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(
                f"{pretrained_model_name_or_path} is a {type(config).model_type!r} model, which "
                "has no causal LM in Transformers."
            )
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return made.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def generate(self, *args: Any, domain: Domain | Unset = UNSET, **kwargs: Any) -> Any:
        """Generate as the base does, with only a domain's neurons.

        Args:
            args: As the base's.
            domain: A domain's name, a list with a name or None per prompt, or None for dense;
                omitted: the ambient ``pathway``, else the default domain. A sparse assistant
                model uses the same domain if it has one of that name.
            kwargs: As the base's.

        Raises:
            UnknownNameError: An unknown domain.
            PathwaysError: A list whose length is not the number of prompts.
        """
        with ExitStack() as stack:
            stack.enter_context(self._generating(domain, args, kwargs))
            signature = inspect.signature(super().generate)
            assistant = signature.bind_partial(*args, **kwargs).arguments.get("assistant_model")
            if isinstance(assistant, SparsePathwaysForCausalLM) and domain in assistant.domains:
                stack.enter_context(assistant.pathway(domain))
            return super().generate(*args, **kwargs)

    @contextmanager
    def _generating(
        self, domain: Domain | Unset, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Make the choice for a whole generation; rows are repeated for beams."""
        if isinstance(domain, Unset):
            ambient = find_choice(self._attachment.key)
            chosen = (
                self._resolve(self.config.default_domain) if ambient is None else ambient.pathway
            )
        else:
            chosen = self._resolve(domain)
        if isinstance(chosen, Tensor):
            fit_rows(chosen, _batch_size(args, kwargs), expand=False)
        previous = push_choice(self._attachment.key, chosen, expand=True)
        try:
            yield
        finally:
            restore_choices(previous)


_CLASSES: dict[tuple[type, type], Any] = {}


def model_class_for(
    base: type[PreTrainedModel], config_class: type[SparsePathwaysConfig]
) -> type[SparsePathwaysModel]:
    """Return the class made from ours and a base's, with a ``forward`` that takes ``domain``."""
    if (base, config_class) not in _CLASSES:
        ours = SparsePathwaysForCausalLM if base.can_generate() else SparsePathwaysModel
        namespace = {
            "__module__": __name__,
            "__doc__": base.__doc__,
            "config_class": config_class,
            "forward": _forward_with_domain(base.forward),
        }
        made = type(f"{CLASS_PREFIX}{base.__name__}", (ours, base), namespace)
        _CLASSES[base, config_class] = made
    return _CLASSES[base, config_class]


def register_models(base: type[PreTrainedConfig], made: type[SparsePathwaysConfig]) -> None:
    """Register the models of a configuration class with the auto classes."""
    for auto, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModel, MODEL_MAPPING),
    ):
        if base in mapping:
            model_class = _first(mapping[base])
            _share_conversion(model_class)
            auto.register(made, model_class_for(model_class, made), exist_ok=True)


def _share_conversion(base: type[PreTrainedModel]) -> None:
    """Convert our class's checkpoints as the base's, where that is kept by the class's name."""
    conversion = get_checkpoint_conversion_mapping(base.__name__)
    if conversion is not None:
        name = f"{CLASS_PREFIX}{base.__name__}"
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)


def _forward_with_domain(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``forward`` with the base's signature and a keyword ``domain``.

    The signature matters: ``generate`` and ``Trainer`` read it to decide what they pass.
    """

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, domain: Any = UNSET, **kwargs: Any) -> Any:
        previous = self._enter(domain, args, kwargs)
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            restore_choices(previous)

    signature = inspect.signature(base_forward)
    parameters = list(signature.parameters.values())
    named = inspect.Parameter("domain", inspect.Parameter.KEYWORD_ONLY, default=UNSET)
    last = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last -= 1
    parameters.insert(last, named)
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the rows of a call's main input; 1 without any, as ``generate`` starts from BOS."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    for value in (*args[:1], *named):
        if isinstance(value, Tensor):
            return int(value.shape[0])
    return 1


def _copy_structure(model: nn.Module, replaced: dict[int, Any]) -> Any:
    """Copy the modules of a model, sharing its parameters and buffers.

    Args:
        model: The model; unchanged.
        replaced: ``id(object) -> stand-in`` for objects that the copy has instead.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**shared, **replaced})


def _check_convertible(model: nn.Module) -> None:
    base, config = type(model), getattr(model, "config", None)
    if isinstance(model, SparsePathwaysModel):
        raise UnsupportedModelError(
            f"{base.__name__} has pathways already: use set_pathways, or to_dense() first."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{base.__name__} has a {type(config).__name__}, from which AutoModelForCausalLM could "
            "not load a saved model again. Only models that it loads by themselves fit."
        )
    known = _first(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if base is not known:
        raise UnsupportedModelError(
            f"{base.__name__} cannot be given pathways: it has to be a {known.__name__}, as "
            "AutoModelForCausalLM returns it, not a bare decoder, a classifier or an adapter "
            "model (merge that first)."
        )
    _check_undispatched(model)


def _check_undispatched(model: nn.Module) -> None:
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"The model is already dispatched to {', '.join(devices) or 'devices'}, and its hooks "
            "would bypass the pathways. Load it with SparsePathwaysForCausalLM.from_pretrained("
            "base, pathways=..., device_map=...), which attaches them before dispatch."
        )


def _read_pathways(
    pathways: "Pathways | str | PathLike[str] | None",
    beside: "str | PathLike[str]",
    kwargs: dict[str, Any],
) -> Pathways:
    """Return pathways as given, from their own place, or from beside the weights."""
    if isinstance(pathways, Pathways):
        return pathways
    if pathways is not None:
        token = {"token": kwargs["token"]} if kwargs.get("token") is not None else {}
        return Pathways.from_pretrained(pathways, **token)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    return Pathways.from_pretrained(beside, **hub)


def _first(entry: Any) -> Any:
    """Return the class that an auto mapping's entry stands for."""
    return entry[0] if isinstance(entry, (list, tuple)) else entry


def _new_model(base: type[PreTrainedModel], config_base: type[PreTrainedConfig]) -> Any:
    made = model_class_for(base, config_class_for(config_base))
    return made.__new__(made)
