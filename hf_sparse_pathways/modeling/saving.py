"""Saving and loading weights with their pathways: all of them, or what one domain needs."""

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.execution import check_executor
from hf_sparse_pathways.modeling.partial import (
    HOW_TO_LOAD_ALL,
    Loading,
    Partial,
    current_loading,
    partial_load,
)
from hf_sparse_pathways.modeling.replacement import refuse
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.revision import find_revision, note_revision
from hf_sparse_pathways.sgatlin.settings import FfnConfig, read_ffn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from transformers import PreTrainedModel as _Base

    from hf_sparse_pathways.share.card import CardSettings
else:
    _Base = object

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


class Saving(_Base):
    """The part of ``SparsePathwaysModel`` that is about folders and the Hub."""

    config: Any
    pathways: Any
    set_executor: Any
    max_resident_bytes: Any
    check_no_adapters: Any
    _pathways: Any
    _partial: Any

    def save_pretrained(
        self,
        save_directory: "str | PathLike[str]",
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save weights, configuration and pathways; see the base for the other arguments.

        A model with FFN layers of its own is saved without pathways if it has none.

        Raises:
            UnsupportedModelError: Adapters are attached to domains.
            PathwaysError: There are no pathways, or one domain's neurons were loaded alone.
        """
        bare = self.config.ffn is not None and self._pathways is None and self._partial is None
        named = self.config.domains or self.config.default_domain
        pathways = None if bare and not named else self.pathways
        self.check_no_adapters("they are PEFT's own folders and are not saved with the model")
        names = ("repo_id", "commit_message", "private", "revision", "create_pr")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and pathways is not None:
            pathways.save_pretrained(save_directory)
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub, token=kwargs.get("token"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str | None = "50GB",
        tags: "Sequence[str] | None" = None,
        card: "CardSettings | None" = None,
        **push: Any,
    ) -> str:
        """Upload weights, configuration and pathways to a Hub repository.

        A model with FFN layers of its own is uploaded without pathways if it has none. Pathways
        that the repository has are replaced; other files, such as a tokenizer's, stay.

        Args:
            repo_id: Such as ``"me/smollm2-pathways"``; it is created if needed.
            max_shard_size: Of one file of weights, as ``save_pretrained``'s.
            tags: More tags for the card.
            card: What the card says beside what the pathways say of themselves.
            push: ``token``, ``private``, ``revision``, ``create_pr``, ``commit_message`` and
                ``commit_description``, as everywhere in Transformers.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            PathwaysError: There are no pathways, or one domain's neurons were loaded alone.
            HubError: The Hub cannot be reached, or refuses.
        """
        from hf_sparse_pathways.share.card import CardSettings
        from hf_sparse_pathways.share.pushing import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            said = card or CardSettings()
            said = replace(said, tags=(*said.tags, *(tags or ())))
            return push_folder(folder, repo_id, said, **push)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say what the base says: checkpoint conversion and initialisation depend on it."""
        base: Any = cls.__bases__[-1]
        return bool(base.is_custom_code())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Say what the base says, whose module has the experts."""
        base: Any = cls.__bases__[-1]
        return bool(base._can_set_experts_implementation())

    @classmethod
    def from_pretrained(  # noqa: PLR0913
        cls,
        pretrained_model_name_or_path: "str | PathLike[str]",
        *args: Any,
        pathways: "Pathways | str | PathLike[str] | None" = None,
        executor: str | None = None,
        default_domain: str | None = None,
        max_resident_bytes: int | str | None = None,
        domain: str | None = None,
        allow_transfer: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load weights, configuration and pathways.

        Args:
            pretrained_model_name_or_path: A folder or Hub id that holds the weights, or pathways
                alone: then their base is loaded.
            args: As the base's.
            pathways: Pathways, or the folder or Hub id that holds them; by default they are
                beside the weights.
            executor: How kept neurons are computed; by default as saved.
            default_domain: The domain when ``domain`` is omitted; by default as saved.
            max_resident_bytes: Most bytes of copies of kept weights, also as ``"2GB"``.
            domain: Load this domain's neurons alone. The model then has no other domain and no
                dense form, cannot be saved, and takes the memory of what is kept.
            allow_transfer: Take pathways of another model or revision whose FFN blocks are the
                same, with a warning: this model may be a fine-tune of that one.
            kwargs: As the base's.

        Raises:
            ArtefactError: There are no pathways, or they are corrupt or of a newer format.
            MismatchError: They were made for another model.
        """
        check_executor(executor or "auto")
        ffn = None if pathways is not None else _find_bare(pretrained_model_name_or_path, kwargs)
        if ffn is not None:
            named = getattr(kwargs.get("config"), "default_domain", None)
            if any((executor, default_domain, max_resident_bytes, domain, named)):
                raise refuse(ffn, "it cannot be loaded for a domain, or with an executor")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        weights_of = getattr(kwargs.get("config"), "weights_of", None)
        beside = pathways is None and weights_of is None
        pathways = _read_pathways(pathways, pretrained_model_name_or_path, domain, kwargs)
        if weights_of is not None:
            pretrained_model_name_or_path, kwargs = _from_base(weights_of, kwargs)
        loading = None if domain is None else Loading(pathways, domain)
        if loading is not None and default_domain not in (None, domain):
            raise Partial(loading.domain).refuse(f"default_domain={default_domain!r} is another")
        with partial_load(loading):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        note_revision(model, pretrained_model_name_or_path, **hub)
        model.config.weights_of = None
        model._shape = replace(model._shape, revision=find_revision(model.config))
        if not beside:
            pathways.base.check_origin(model._shape, allow_transfer=allow_transfer)
        model._settle_options(default_domain, executor, max_resident_bytes)
        if loading is None:
            model.set_pathways(pathways)
        elif model._partial is None:
            raise UnsupportedModelError(
                "This version of transformers loads models in a way in which they cannot be loaded "
                f"in part. {HOW_TO_LOAD_ALL}instead."
            )
        return loaded

    def _settle_options(
        self, default_domain: str | None, executor: str | None, max_resident_bytes: int | str | None
    ) -> None:
        """Set what is given, in place of what was saved."""
        if default_domain is not None:
            self.config.default_domain = default_domain
        if executor is not None:
            self.set_executor(executor)
        if max_resident_bytes is not None:
            self.max_resident_bytes = max_resident_bytes

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


def _find_bare(place: "str | PathLike[str]", kwargs: dict[str, Any]) -> FfnConfig | None:
    """Return what the FFNs of a model without pathways are that is being loaded.

    None if they are its base's, or there are pathways beside.

    Args:
        place: The model's folder or Hub id.
        kwargs: As of ``from_pretrained``.
    """
    config = kwargs.get("config")
    if config is not None:
        return None if getattr(config, "domains", None) else getattr(config, "ffn", None)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    fields: dict[str, Any] = {}
    with suppress(OSError):  # what is missing is told when it is needed
        fields, _ = PreTrainedConfig.get_config_dict(place, **hub)
    if fields.get("ffn") is None or fields.get("domains"):
        return None
    return read_ffn(fields["ffn"])


def _from_base(of: tuple[str, str | None], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what is loaded where pathways lie without weights: their base, at its revision."""
    name, revision = of
    places = ("revision", "subfolder")  # those of the pathways' repository
    others = {key: value for key, value in kwargs.items() if key not in places}
    adapter = others.get("adapter_kwargs") or {}
    others["adapter_kwargs"] = {key: adapter[key] for key in adapter if key not in places}
    return name, {**others, "revision": revision} if revision else others


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
