"""A LoRA adapter per domain, which switches with the domain.

PEFT loads the adapters and computes them: its layers take ``adapter_names``, one per row, and mix
them in one batch. What is new here is who says the names: not a caller or a setting of the
modules, but the choice of pathway on the calling thread. So every way of naming a domain (one for
all, one per row, a scope, the default) chooses the adapter as well, and threads do not disturb each
other. Dense rows, and domains without an adapter, have none.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse_pathways.errors import (
    ArtefactError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
    UnsupportedModelError,
)
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.choices import ModelKey, find_choice
from hf_sparse_pathways.modeling.partial import Partial

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

NO_ADAPTER = "__base__"
"""PEFT's name for rows without an adapter."""

_WHOLE_MODEL = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
)
"""Settings of a LoRA that PEFT does not compute row by row."""


class Adapting(_Base):
    """The part of ``SparsePathwaysModel`` that is about adapters of domains."""

    _attachment: Attachment
    _partial: Partial | None
    _adapters: "_NameAdapters | None" = None
    domains: Any

    @property
    def adapters(self) -> list[str]:
        """The domains that have an adapter."""
        return [] if self._adapters is None else list(self._adapters.adapted)

    def attach_adapters(self, adapters: "Mapping[str, str | os.PathLike[str]]", **hub: Any) -> None:
        """Give domains a LoRA each, in place: from now on it is on whenever its domain is.

        An adapter of FFN leaves makes their blocks run masked; one of the attention alone leaves
        the executor as it is. Adapters are not saved with the model.

        Args:
            adapters: By domain, a PEFT adapter's folder or Hub id.
            hub: ``revision``, ``token``, ``cache_dir`` and so on, for Hub ids.

        Raises:
            UnknownNameError: There is no such domain.
            UnsupportedModelError: The model has adapters already, or an adapter is no plain LoRA.
            MismatchError: An adapter was made for a model with other modules.
            ArtefactError: There is no adapter.
            PathwaysError: PEFT is missing, none are given, or one domain's neurons were loaded
                alone.
        """
        self._check_attachable(adapters)
        places = {domain: str(place) for domain, place in adapters.items()}
        training, trained = self.training, {id(p) for p in self.parameters() if p.requires_grad}
        with _unwrapped_after_errors(self):
            _load_all(_import_peft(), self, places, hub)
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.train(training)
        self._adapters = _NameAdapters(self._attachment.key, tuple(adapters), self.domains)
        for layer in _wrappers(self).values():
            layer.register_forward_pre_hook(self._adapters, with_kwargs=True)

    def detach_adapters(self) -> None:
        """Take the domains' adapters off, in place."""
        if self._adapters is not None:
            _unwrap(self)
            self._adapters = None

    def check_no_adapters(self, what: str) -> None:
        """Check that no adapters are attached.

        Raises:
            UnsupportedModelError: Some are.
        """
        if self._adapters is not None:
            raise UnsupportedModelError(
                f"Adapters are attached to {', '.join(map(repr, self.adapters))}: {what}. Call "
                "model.detach_adapters() first, and attach_adapters again afterwards."
            )

    def check_adapted(self, domains: list[str]) -> None:
        """Check that no domain with an adapter is missing among new ones.

        Raises:
            UnsupportedModelError: One is.
        """
        if not {*self.adapters} <= {*domains}:
            self.check_no_adapters("the new pathways do not have all of these domains")

    def _check_attachable(self, adapters: Mapping[str, Any]) -> None:
        if self._partial is not None:
            raise self._partial.refuse("an adapter's matrices do not fit the neurons that are left")
        if not adapters:
            raise PathwaysError("attach_adapters needs at least one: {domain: folder or Hub id}.")
        for domain in adapters:
            if domain not in self.domains:
                raise UnknownNameError("domain", domain, self.domains)
        self.check_no_adapters("others take their place")
        if _wrappers(self):
            raise UnsupportedModelError(
                "The model has adapters of its own, which would be switched off. Merge or unload "
                "them before domains are given theirs."
            )


class _NameAdapters:
    """Forward pre-hook that tells a layer of PEFT which adapter each row has."""

    def __init__(self, key: ModelKey, adapted: tuple[str, ...], domains: list[str]) -> None:
        self.key, self.adapted = key, adapted
        self.follow(domains)

    def follow(self, domains: list[str]) -> None:
        """Take the domains in the order of their indices."""
        self.names = [_inner_name(d) if d in self.adapted else NO_ADAPTER for d in domains]

    def __call__(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        foreign = {*layer.active_adapters} - {*self.names}
        if foreign:
            raise UnsupportedModelError(
                f"The adapter {', '.join(sorted(foreign))} was added to a model whose domains have "
                "adapters of their own. Call model.detach_adapters() before."
            )
        return args, {**kwargs, "adapter_names": self._of_rows(len(args[0]))}

    def _of_rows(self, rows: int) -> list[str]:
        """Return one name per row of a layer's input, whose rows may be tokens."""
        choice = find_choice(self.key)
        if choice is None or choice.rows is None:
            chosen: Any = None if choice is None else choice.pathway
            return [self._of(chosen)] * rows
        names = [self._of(index) for index in choice.rows]
        return [name for name in names for _ in range(rows // len(names))]

    def _of(self, index: int | None) -> str:
        """Return the name for a pathway; controls have no adapter."""
        if index is None or not 0 <= index < len(self.names):
            return NO_ADAPTER
        return self.names[index]


def _inner_name(domain: str) -> str:
    """Return a domain's name as a module's, which has no dots and is no attribute's."""
    return f"pathway-{domain.replace('.', '%2E')}"


def _load_all(peft: Any, model: Any, places: Mapping[str, str], hub: Mapping[str, Any]) -> None:
    """Read domains' adapters into a model, in place, after all their configurations."""
    configs = {domain: _read_config(peft, domain, place, hub) for domain, place in places.items()}
    holder = model
    for domain, config in configs.items():
        holder = _load(peft, holder, config, domain, places[domain], hub)
    holder.base_model.set_adapter([_inner_name(domain) for domain in places])


def _load(
    peft: Any, holder: Any, config: Any, domain: str, place: str, hub: Mapping[str, Any]
) -> Any:
    """Read a domain's adapter into a model, in place.

    Args:
        peft: The library.
        holder: The model; from the second adapter on what this returned for the first.
        config: The adapter's.
        domain: The domain.
        place: Folder or Hub id.
        hub: As in ``attach_adapters``.

    Raises:
        MismatchError: It was made for a model with other modules.
    """
    name = _inner_name(domain)
    try:
        if not isinstance(holder, peft.PeftModel):
            holder = peft.PeftModel(holder, config, adapter_name=name)  # with a head or without
        found = holder.load_adapter(place, adapter_name=name, **hub)
    except (ValueError, RuntimeError) as error:
        raise _other_model(domain, place, str(error)) from error
    missing = [key for key in found.missing_keys if "lora_" in key and name in key]
    wrong = [*found.unexpected_keys, *missing]
    if wrong:
        raise _other_model(domain, place, f"{wrong[0]} is in one of them alone")
    return holder


def _other_model(domain: str, place: str, why: str) -> MismatchError:
    return MismatchError(f"The adapter {place} of {domain!r} does not fit this model: {why}")


def _read_config(peft: Any, domain: str, place: str, hub: Mapping[str, Any]) -> Any:
    """Return an adapter's configuration, if PEFT can compute it for some rows of a batch.

    Raises:
        ArtefactError: There is none.
        UnsupportedModelError: It cannot.
    """
    try:
        config = peft.PeftConfig.from_pretrained(place, **hub)
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{place} holds no PEFT adapter for {domain!r}: {error}") from error
    if config.peft_type != peft.PeftType.LORA:
        raise UnsupportedModelError(
            f"The adapter of {domain!r} is of the kind {config.peft_type.value}; domains take LoRA."
        )
    found = [name for name in _WHOLE_MODEL if getattr(config, name, None)]
    if config.bias != "none":
        found.append("bias")
    if found:
        raise UnsupportedModelError(
            f"The adapter of {domain!r} has {', '.join(found)}, which cannot be on for some rows "
            "and off for others. Train one without, or merge it into a model of its own."
        )
    return config


@contextmanager
def _unwrapped_after_errors(model: nn.Module) -> Iterator[None]:
    """Take all adapters off a model if the block fails."""
    try:
        yield
    except BaseException:
        _unwrap(model)
        raise


def _unwrap(model: nn.Module) -> None:
    """Put back what PEFT has wrapped, in place."""
    for name, layer in _wrappers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    if "peft_config" in vars(model):
        del model.peft_config


def _wrappers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that PEFT has put around others, by their names."""
    return {name: one for name, one in model.named_modules() if hasattr(one, "get_base_layer")}


def _import_peft() -> Any:
    """Return the module.

    Raises:
        PathwaysError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise PathwaysError(
            "Adapters need PEFT. Install it with `pip install hf-sparse-pathways[peft]`."
        ) from error
    return peft
