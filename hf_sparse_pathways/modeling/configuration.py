"""The configuration of a model with pathways: the base's own, with a few fields more.

On disk ``model_type`` is ``sparse_pathways`` and ``base_model_type`` names the architecture. In
memory the configuration is an instance of a class made from ``SparsePathwaysConfig`` and the
base's class, whose ``model_type`` stays the base's: much code outside reads it (adapter targets,
weight conversions, tokenisers), and every field of the base is where it was.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from hf_sparse_pathways.errors import (
    ArtefactError,
    PathwaysError,
    UnknownNameError,
    UnsupportedModelError,
)
from hf_sparse_pathways.ffn.execution import check_executor
from hf_sparse_pathways.files import write_atomically
from hf_sparse_pathways.modeling.prompt_settings import PromptSettings
from hf_sparse_pathways.pathways.entry import AUTO_MAP, MODEL_TYPE, MODULE, MODULE_NAME, base_of
from hf_sparse_pathways.pathways.names import AUTO, PROMPT
from hf_sparse_pathways.sgatlin.settings import FfnConfig, read_ffn

if TYPE_CHECKING:
    from os import PathLike

FORMAT_VERSION = 1
"""Version of the saved artefact; a newer one is refused."""


class SparsePathwaysConfig(PreTrainedConfig):
    """Configuration of a causal LM with pathways.

    Instances come from ``from_base`` or ``AutoConfig.from_pretrained`` and also derive from the
    base's configuration class, with all its fields.

    Attributes:
        domains: The domains' names, in the order of their indices.
        default_domain: The domain when ``domain`` is omitted; None for dense.
        executor: How kept neurons are computed: a name in ``EXECUTORS``, or ``"auto"``.
        pathways_format: Version of the artefact's format.
        ffn: What the model's FFNs are instead of the base's, such as ``SgatlinConfig(...)``; of
            sgatlin layers domains keep experts, others have no domains. None for the base's own.
        ffn_blocks: Which of the base's FFN blocks they replace, numbers from 0; None for all.
        prompt_pathways: How ``domain="prompt"`` picks neurons, ``sparsity`` and ``rule``; None for
            the defaults of ``PromptSettings``.

    Where ``permute`` has put the neurons in another order, ``neuron_order`` identifies it; the
    plain configuration of ``to_dense`` has it too, since the order is that of the weights.
    """

    model_type = MODEL_TYPE

    domains: list[str] | None = None
    default_domain: str | None = None
    executor: str = "auto"
    pathways_format: int = FORMAT_VERSION
    ffn = cast("FfnConfig | None", None)
    ffn_blocks = cast("list[int] | None", None)
    prompt_pathways: dict[str, Any] | None = None
    weights_of = None
    """Name and revision of the base's repository where the pathways lie without weights."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG004
        """Refuse an instance without a base; ``from_base`` makes one with it."""
        if cls is SparsePathwaysConfig:
            raise TypeError(
                "SparsePathwaysConfig needs a base's fields; use "
                "SparsePathwaysConfig.from_base(base_config, domains=[...]), or "
                "AutoConfig.from_pretrained(folder)."
            )
        return super().__new__(cls)

    @classmethod
    def from_base(cls, base_config: PreTrainedConfig, **fields: Any) -> Self:
        """Return a base's configuration with pathway fields; the base's is copied.

        Args:
            base_config: Configuration of the dense model.
            fields: ``domains``, ``default_domain``, ``executor``, and ``ffn``, for a model that
                ``AutoModelForCausalLM.from_config`` builds with other FFNs, in place of the
                ``ffn_blocks`` if these are named.

        Raises:
            UnsupportedModelError: The base is not an architecture of Transformers.
            UnknownNameError: An unknown field or executor, or a default that is no domain.
            PathwaysError: ``ffn`` is no FFN layer's configuration.
        """
        known = ("domains", "default_domain", "executor", "ffn", "ffn_blocks")
        for name in fields:
            if name not in known:
                raise UnknownNameError("field", name, known)
        config = copy.deepcopy(base_config)
        config.__class__ = config_class_for(_base_class(base_config))
        values = {"domains": [], "default_domain": None, "executor": "auto", **fields}
        if "ffn" in fields:  # of the base's own, if it had some, nothing stays
            numbers = fields.get("ffn_blocks")
            values["ffn_blocks"] = [*numbers] if isinstance(numbers, tuple | range) else numbers
        for name, value in {**values, "pathways_format": FORMAT_VERSION}.items():
            setattr(config, name, value)
        config.check_ffn()
        config.check_default_domain(config.domains)
        check_executor(config.executor)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a saved dictionary; the entry class makes the base's derived class."""
        if cls is not SparsePathwaysConfig:
            return super().from_dict(_with_ffn(config_dict), **kwargs)
        weights_of = base_of(config_dict)
        fields = dict(config_dict) if weights_of is None else _base_fields(*weights_of)
        if "pathways_format" in fields and fields.get("model_type") != MODEL_TYPE:
            fields.setdefault("base_model_type", fields.get("model_type"))  # of to_dict()
        base_type = _check_saved(fields)
        for name in ("model_type", "base_model_type", "auto_map"):
            fields.pop(name, None)
        made = config_class_for(CONFIG_MAPPING[base_type])
        return made.from_dict(fields, weights_of=weights_of, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load from a folder or Hub repository that holds pathways."""
        if cls is SparsePathwaysConfig:
            return AutoConfig.from_pretrained(*args, **kwargs)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: a saved configuration brings a module that imports this one."""

    def save_pretrained(
        self, save_directory: "str | PathLike[str]", push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as the base does, with the module by which Transformers finds the package."""
        write_atomically(Path(save_directory, MODULE_NAME), MODULE)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a saved dictionary, with the base's model type in place of the entry's."""
        fields, rest = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == MODEL_TYPE and cls is not SparsePathwaysConfig:
            fields = {**fields, "model_type": _check_saved(fields)}
        return fields, rest

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, as JSON values."""
        fields = super().to_dict()
        if self.ffn is not None:
            fields["ffn"] = self.ffn.to_dict()
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is saved: the entry's model type, and the base's beside it."""
        fields = super().to_diff_dict()
        own = {name: getattr(self, name) for name in _OWN_FIELDS}
        unsaved = {"weights_of"}
        if self.prompt_pathways is None:
            unsaved.add("prompt_pathways")
        saved = {
            **fields,
            **own,
            "auto_map": AUTO_MAP,
            "model_type": MODEL_TYPE,
            "base_model_type": type(self).model_type,
        }
        return {name: value for name, value in saved.items() if name not in unsaved}

    @property
    def base_config(self) -> PreTrainedConfig:
        """A plain base configuration with the same values."""
        config = copy.deepcopy(self)
        config.__class__ = type(self).__bases__[1]
        for name in (*_OWN_FIELDS, "weights_of", "ffn", "ffn_blocks"):
            config.__dict__.pop(name, None)
        return config

    def check_default_domain(self, domains: list[str]) -> None:
        """Check that the default is one of some domains, or what decides from the prompt.

        Raises:
            UnknownNameError: It is not.
        """
        if self.default_domain not in (None, AUTO, PROMPT, *domains):
            raise UnknownNameError("default domain", self.default_domain, domains)

    def check_ffn(self) -> None:
        """Check that ``ffn`` is of an FFN layer, and ``ffn_blocks`` are numbers.

        Raises:
            PathwaysError: They are not.
        """
        numbers = self.ffn_blocks
        if numbers is not None:
            listed = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
            if self.ffn is None or not listed or not numbers or len({*numbers}) < len(numbers):
                raise PathwaysError(
                    "ffn_blocks takes a list of different FFN blocks' numbers, from 0, beside ffn; "
                    f"got {numbers!r:.100}."
                )
        if self.ffn is None:
            return
        if not isinstance(self.ffn, FfnConfig):
            raise PathwaysError(
                "ffn takes the configuration of an FFN layer, such as sp.SgatlinConfig(n_experts="
                f"1024), got {self.ffn!r:.100}."
            )

    def check_bare(self) -> None:
        """Check that nothing asks for pathways where the model's FFNs cannot have any.

        Raises:
            PathwaysError: Something does.
        """
        asked = [name for name in ("domains", "default_domain") if getattr(self, name)]
        if self.executor != "auto":
            asked.append("executor")
        if asked:
            raise PathwaysError(
                f"{', '.join(asked)} does not go together with ffn={self.ffn}: such layers have no "
                "pathways, so no domains, and no executor of kept neurons."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the base's class, since the derived one is made at run time."""
        return _new_config, (type(self).__bases__[1],), self.__dict__


_OWN_FIELDS = ("domains", "default_domain", "executor", "pathways_format", "prompt_pathways")

# A dataclass lists inherited fields as its own. In a class made from this one *and* a base's, the
# general defaults would then win over the base's (bos_token_id, ...), so only our own stay listed.
SparsePathwaysConfig.__dataclass_fields__ = {
    name: SparsePathwaysConfig.__dataclass_fields__[name] for name in _OWN_FIELDS
}


_CLASSES: dict[type[PreTrainedConfig], type[SparsePathwaysConfig]] = {}


def config_class_for(base: type[PreTrainedConfig]) -> type[SparsePathwaysConfig]:
    """Return the class made from ``SparsePathwaysConfig`` and a base's, registered when made."""
    if base not in _CLASSES:
        from hf_sparse_pathways.modeling.classes import register_models

        name = f"SparsePathways{base.__name__}"
        namespace = {"model_type": base.model_type, "__module__": __name__, "__doc__": base.__doc__}
        made = type(name, (SparsePathwaysConfig, base), namespace)
        register_models(base, made)
        _CLASSES[base] = made
    return _CLASSES[base]


def _check_saved(fields: dict[str, Any]) -> str:
    """Check our fields of a saved configuration; return the base's model type.

    Raises:
        ArtefactError: One is of the wrong kind, of a newer format, or of an unknown base.
        UnknownNameError: There is no such executor.
    """
    base_type, version = fields.get("base_model_type"), fields.get("pathways_format")
    known = isinstance(base_type, str) and base_type in CONFIG_MAPPING
    if not known or base_type == MODEL_TYPE:
        raise ArtefactError(
            f"config.json names the base architecture {base_type!r}, which this version of "
            "Transformers does not have. Upgrade transformers."
        )
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtefactError(
            f"config.json has pathways_format {version!r}; this version of "
            f"hf-sparse-pathways reads up to {FORMAT_VERSION}. Upgrade hf-sparse-pathways."
        )
    domains = fields.get("domains")
    if not isinstance(domains, list | None) or not all(map(_is_word, domains or ())):
        raise ArtefactError(f"config.json has domains {domains!r:.200}, which is no list of names.")
    for name in ("default_domain", "neuron_order"):
        value = fields.get(name)
        if not (value is None or _is_word(value)):
            raise ArtefactError(f"config.json has {name} {value!r:.200}, which is no name.")
    PromptSettings.from_dict(fields.get("prompt_pathways"))
    executor = fields.get("executor", "auto")
    check_executor(executor if isinstance(executor, str) else repr(executor))
    return str(base_type)


def _with_ffn(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration with the FFN layers' as an object.

    Raises:
        ArtefactError: It is none.
    """
    ffn = fields.get("ffn")
    if ffn is None or isinstance(ffn, FfnConfig):
        return fields
    return {**fields, "ffn": read_ffn(ffn)}


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _base_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    if isinstance(config, SparsePathwaysConfig):
        return type(config).__bases__[1]
    model_type = type(config).model_type
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] is not type(config):
        raise UnsupportedModelError(
            f"{type(config).__name__} is not a configuration of Transformers itself, so a saved "
            "model could not be loaded again. Models with custom code are not supported."
        )
    return type(config)


def _base_fields(name: str, revision: str | None) -> dict[str, Any]:
    """Read the configuration of the base that pathways without weights name.

    Raises:
        ArtefactError: It cannot be found, or has no weights either.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise ArtefactError(
            f"These pathways were made for {name!r}, which cannot be loaded: "
            f"{str(error).strip().splitlines()[0]} If it lies elsewhere, pass that as the model "
            "and this as pathways=."
        ) from error
    if not fields or base_of(fields) is not None:
        raise ArtefactError(f"These pathways were made for {name!r}, which has no weights.")
    base_type = fields.get("model_type")
    return {"base_model_type": base_type, "pathways_format": FORMAT_VERSION, **fields}


def _new_config(base: type[PreTrainedConfig]) -> SparsePathwaysConfig:
    made = config_class_for(base)
    return made.__new__(made)


AutoConfig.register(MODEL_TYPE, SparsePathwaysConfig, exist_ok=True)
