"""Causal LMs with pathways: made from dense models, loaded, and generating in a domain."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.choices import Choice, find_choice
from hf_sparse_pathways.ffn.execution import check_executor
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig
from hf_sparse_pathways.modeling.domains import UNSET, Unset, fit_rows
from hf_sparse_pathways.modeling.guard import Guard, count_prompt, watch_rows
from hf_sparse_pathways.modeling.model import (
    Domain,
    SparsePathwaysModel,
    batch_size,
    made_class,
)
from hf_sparse_pathways.modeling.picked import Picked, check_forms, tell_decisions
from hf_sparse_pathways.modeling.routing import agreed
from hf_sparse_pathways.modeling.saving import HUB_ARGUMENTS
from hf_sparse_pathways.modeling.structure import (
    check_convertible,
    check_undispatched,
    copy_structure,
)
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.tokens import check_token

if TYPE_CHECKING:
    from os import PathLike


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
        allow_transfer: bool = False,
    ) -> Any:
        """Return a model with pathways that shares a dense model's parameters. Pure.

        Args:
            model: A causal LM, dense or with FFN layers of its own; it stays without pathways.
                Later changes of the weights, of their dtype or device too, are changes of both.
            pathways: Pathways that were made for it.
            executor: How kept neurons are computed.
            default_domain: The domain when ``domain`` is omitted; None for dense.
            allow_transfer: Take pathways of another model or revision whose FFN blocks are the
                same, with a warning: this model may be a fine-tune of that one.

        Raises:
            MismatchError: The pathways were made for another model.
            UnsupportedModelError: It is no causal LM of Transformers, or already dispatched.
            UnknownNameError: Unknown executor or default domain.
        """
        check_executor(executor)
        check_convertible(model)
        pathways.check_fits(model, allow_transfer=allow_transfer)
        config = SparsePathwaysConfig.from_base(
            model.config,
            domains=pathways.domains,
            default_domain=default_domain,
            executor=executor,
        )
        sparse = copy_structure(model, {id(model.config): config})
        if config.ffn is None:  # one with FFN layers of its own has its leaves swapped already
            sparse.__class__ = made_class(type(model), type(config))
            sparse._shape = BaseModel.of(sparse)
            sparse._attachment = Attachment(sparse)
        sparse.set_pathways(pathways)
        return sparse

    def to_dense(self) -> PreTrainedModel:
        """Return a plain model of the base's class that shares this one's parameters. Pure.

        Of a model with FFN layers of its own it is one of this class without pathways.

        Raises:
            UnsupportedModelError: An adapter wraps a leaf, or the model is dispatched.
            PathwaysError: One domain's neurons were loaded alone.
        """
        check_undispatched(self)
        if self._partial is not None:
            raise self._partial.refuse("there is no dense form of it")
        self.check_has_parts("there is no dense form of it")
        self.check_no_adapters("a plain model has no domains that they could follow")
        if self.config.ffn is not None:
            return self._without_pathways()
        base_config = self.config.base_config
        dense = self._copy_without_pathways(base_config)
        dense._attachment.detach()
        del dense._attachment, dense._pathways, dense._shape
        dense.__dict__.pop("_router", None)
        dense.__class__ = type(self).__bases__[1]
        return dense

    def _copy_without_pathways(self, config: Any) -> Any:
        """Return a copy that shares its parameters, with another configuration."""
        replaced = {id(self.config): config, id(self._pathways): None}
        return copy_structure(self, {**replaced, **self._attachment.without_pathways})

    def _without_pathways(self) -> Any:
        """Return a model of the same class that shares its parameters and has no pathways. Pure."""
        layers = {"ffn": self.config.ffn, "ffn_blocks": self.config.ffn_blocks}
        config = SparsePathwaysConfig.from_base(self.config.base_config, **layers)
        bare = self._copy_without_pathways(config)
        bare._attachment.load([], [])
        bare.__dict__.pop("_router", None)
        return bare

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
                of a plain base), ``executor``, ``default_domain``, ``domain`` (to load one
                domain's neurons alone), and everything that Transformers takes.

        Raises:
            ArtefactError: There are no pathways, or they are corrupt or of a newer format.
            MismatchError: They were made for another model.
        """
        if cls is not SparsePathwaysForCausalLM:
            return super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, **kwargs
            )
        check_token(kwargs.get("token"))
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

    def generate(
        self, *args: Any, domain: Domain | Unset = UNSET, guard: bool = False, **kwargs: Any
    ) -> Any:
        """Generate as the base does, with only a domain's neurons.

        Args:
            args: As the base's.
            domain: A domain's name, a list with a name or None per prompt, or None for dense;
                omitted: the ambient ``pathway``, else the default domain. ``"auto"`` in place of a
                name: what ``route`` says of the prompt, for the whole generation; an output that
                is returned as a dictionary has it as ``domains``. ``"prompt"``: the prompt is
                computed densely, what follows with the neurons that it has used, which such an
                output has as ``picked``; ``"prompt:code"`` has a domain as prior (see
                ``set_prompt_pathways``). What was picked may itself be named. A sparse assistant
                model uses the same domain if it has one of that name.
            guard: Whether to watch the new tokens of each row. One whose text leaves its domain
                goes on densely until it comes back; with ``"auto"`` it may go to other domains,
                too. What was computed before stays in the cache. An output that is returned as a
                dictionary has ``domains``, those of the beginning, and ``switches``.
            kwargs: As the base's.

        Raises:
            UnknownNameError: An unknown domain.
            PathwaysError: A list whose length is not the number of prompts; or a guard for a
                domain whose text is not known.
        """
        asked = self._asked(domain)
        routed = self._route_call(domain, args, kwargs, whole=True)
        if routed is not None:
            domain = agreed(routed)
        picked = self._pick_from(domain, args, kwargs)
        with ExitStack() as stack:
            choice = stack.enter_context(self._generating(domain, args, kwargs, picked))
            if guard:
                choice.guard = self._guard(choice, asked, args, kwargs)
            signature = inspect.signature(super().generate)
            assistant = signature.bind_partial(*args, **kwargs).arguments.get("assistant_model")
            if isinstance(assistant, SparsePathwaysForCausalLM) and domain in assistant.domains:
                stack.enter_context(assistant.pathway(domain))
            output = super().generate(*args, **kwargs)
            if choice.guard is not None:
                routed = choice.guard.tell(output)
            return tell_decisions(output, routed if picked is None else picked)

    @contextmanager
    def _generating(
        self,
        domain: Domain | Unset,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        picked: Picked | None,
    ) -> Iterator[Choice]:
        """Make the choice for a whole generation; rows are repeated for beams."""
        if picked is not None:
            check_forms(kwargs)
            with self._picking(picked) as choice:
                yield choice
            return
        chosen, _, before = self._chosen(domain)
        if isinstance(chosen, Tensor):
            fit_rows(chosen, batch_size(args, kwargs), expand=False)
        with self._holding(chosen, expand=True, picked=before) as choice:
            yield choice

    def _guard(
        self, choice: Choice, asked: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Guard:
        """Return what watches a generation.

        Raises:
            PathwaysError: The text of a row's domain is not known, or there is no dense model; or
                a row's neurons were picked from a prompt.
        """
        if choice.call is not None or choice.picked is not None:
            raise PathwaysError(
                "A guard watches whether a text leaves its domain, and what is picked from a "
                "prompt has none: name the domain, or leave out guard."
            )
        if self._partial is not None:
            raise self._partial.refuse("a guard has no dense model to fall back to")
        self._look_at_weights()  # a row that is dense now may go to a domain
        chosen, count = choice.pathway, batch_size(args, kwargs)
        indices = chosen.tolist() if isinstance(chosen, Tensor) else [chosen] * count
        names = [None if index in (None, -1) else self._named[index] for index in indices]
        rows = watch_rows(self.text_router, names, asked)
        return Guard(self.text_router, rows, count_prompt(args, kwargs))

    def follow_guard(self, input_ids: Any) -> None:
        """Let the guard of the generation that is running, if it has one, see its text."""
        choice = find_choice(self._attachment.key)
        if choice is not None and choice.guard is not None:
            domains = choice.guard.follow(input_ids)
            choice.pathway = self._resolve(agreed(domains))

    def _prepare_attention_mask_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Infer which tokens are padding as the base does, and let what picks know it."""
        mask = super()._prepare_attention_mask_for_generation(*args, **kwargs)
        self._note_mask(mask)
        return mask
