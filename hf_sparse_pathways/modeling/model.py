"""A causal LM with pathways: the base's own class, derived from once more.

``SparsePathwaysLlamaForCausalLM`` derives from ``SparsePathwaysForCausalLM`` and
``LlamaForCausalLM``, and so for every architecture; the classes are made when first needed and
registered with the auto classes. Building one swaps the leaves of its FFN blocks (``ffn``), and
``forward`` and ``generate`` put the chosen domain on the calling thread's stack of choices while
the base's own code runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import PreTrainedModel

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.blocks import has_parts
from hf_sparse_pathways.ffn.choices import (
    CheckpointedChoices,
    Choice,
    find_choice,
)
from hf_sparse_pathways.ffn.executors import has_own_dense
from hf_sparse_pathways.ffn.forms import NATIVE
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.modeling.adapting import Adapting
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig, config_class_for
from hf_sparse_pathways.modeling.deciding import Deciding
from hf_sparse_pathways.modeling.domains import Unset, fit_rows, resolve_domain
from hf_sparse_pathways.modeling.executing import Executing
from hf_sparse_pathways.modeling.grouping import group_rows
from hf_sparse_pathways.modeling.partial import (
    Partial,
)
from hf_sparse_pathways.modeling.picked import (
    Picked,
    asks_prompt,
    without_prompts,
)
from hf_sparse_pathways.modeling.prompting import Prompting
from hf_sparse_pathways.modeling.replacement import (
    check_checkpointing,
    find_layers,
    refuse,
    replace_blocks,
)
from hf_sparse_pathways.modeling.routing import Router, agreed, asks_router
from hf_sparse_pathways.modeling.saving import Saving
from hf_sparse_pathways.modeling.structure import check_whole
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.names import AUTO
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

Named = str | Sequence[str | None] | Tensor | None

Domain = Named | Picked


class SparsePathwaysModel(Executing, Adapting, Prompting, Deciding, Saving, _Base):
    """What every model with pathways can do, whatever its head."""

    config: Any
    _attachment: Attachment
    _pathways: Pathways | None
    _shape: BaseModel
    _partial: Partial | None = None

    def __init__(self, config: SparsePathwaysConfig, *args: Any, **kwargs: Any) -> None:
        """Build the base model and swap its FFN leaves; pathways are given afterwards.

        Where the configuration has ``ffn``, such layers take the place of the FFN blocks before.
        """
        config.check_ffn()
        super().__init__(config, *args, **kwargs)
        self._pathways = None
        if config.ffn is not None:
            replace_blocks(self, config.ffn, config.ffn_blocks)
        if config.ffn is None or has_parts(self):
            self._shape = BaseModel.of(self)
            self._attachment = Attachment(self)
        else:
            self._attachment = Attachment(self, blocks=())
            config.check_bare()

    def initialize_weights(self) -> None:
        """Draw new weights as the base does, and in FFN layers as those do, in place."""
        super().initialize_weights()
        with guard_torch_init_functions():  # what was loaded stays
            for layer in find_layers(self):
                layer.reset_parameters()

    # -- pathways ---------------------------------------------------------------------------

    @property
    def pathways(self) -> Pathways:
        """The pathways in use.

        Raises:
            PathwaysError: None were given yet, or one domain's neurons were loaded alone.
        """
        if self._partial is not None:
            raise self._partial.refuse("its pathway is part of the weights now")
        self._check_has_pathways("nothing of it is of one domain")
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
            UnsupportedModelError: An adapter is attached to a domain that they do not have.
            PathwaysError: One domain's neurons were loaded alone; or the default domain is
                ``"auto"``, and they do not know their domains' text.
        """
        if self._partial is not None:
            raise self._partial.refuse("other pathways need other neurons")
        self.check_has_parts("it cannot be given any")
        self.check_adapted(pathways.domains)
        pathways.base.check_same(self._shape)  # adapters may have changed the modules since
        self.config.check_default_domain(pathways.domains)
        if self.config.default_domain == AUTO:
            Router.of(pathways).check()
        if self._shape.experts and not pathways.base.experts:  # what was stored does not say
            pathways = replace(pathways, base=pathways.base.with_experts_of(self._shape))
        named = [*pathways.by_domain.values(), *pathways.controls.values()]
        experts = [pathway.experts for pathway in named]
        self._attachment.load([pathway.blocks for pathway in named], experts)
        self._pathways = pathways
        self.config.domains = pathways.domains
        if self._adapters is not None:
            self._adapters.follow(pathways.domains)
        self._limit_copies()

    def check_has_parts(self, what: str) -> None:
        """Check that there is something in the model of which pathways keep a part.

        Args:
            what: What else cannot be, as the end of a sentence.

        Raises:
            PathwaysError: Its FFNs are layers without anything of the kind.
        """
        if self.config.ffn is not None and not self._attachment.sparse and not self._partial:
            raise refuse(self.config.ffn, what)

    def _check_has_pathways(self, what: str) -> None:
        """Check the same, and that a model with FFN layers of its own has been given pathways."""
        self.check_has_parts(what)
        if self.config.ffn is not None and self._pathways is None:
            raise refuse(self.config.ffn, what)

    def become_partial(self, partial: Partial) -> None:
        """Note that one domain's neurons were loaded alone, in place."""
        self._partial = partial
        self.config.domains, self.config.default_domain = [partial.domain], partial.domain
        self._limit_copies()

    def _limit_copies(self) -> None:
        """Let copies take as much as the weights, if nothing else was said.

        Beside that there is room for one pathway with clusters, whose experts' columns take much,
        while their rows are read in place.
        """
        if self._attachment.residents.limit is None:
            size = sum(p.numel() * p.element_size() for p in self.parameters())
            copies = self._attachment.copies
            self._attachment.residents.limit = size + copies.most(NATIVE, copies.clustered)

    @property
    def domains(self) -> list[str]:
        """The names that ``domain=`` takes."""
        if self._partial is not None:
            return [self._partial.domain]
        return [] if self._pathways is None else self._pathways.domains

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
            PathwaysError: ``max_batch`` is not positive, or a request's domain is not decided yet.
        """
        if AUTO in domains:
            raise PathwaysError(
                f"A request of domain={AUTO!r} can be grouped once its domain is decided: give "
                "what model.route(input_ids, attention_mask) says of it."
            )
        if domains:
            self._resolve(without_prompts(domains))
        return group_rows(domains, max_batch)

    @contextmanager
    def pathway(self, domain: Domain) -> Iterator[Self]:
        """Within the block, calls on this thread that name no domain use this one.

        Coroutines on one thread share its scopes: pass ``domain=`` there instead.

        Args:
            domain: A domain, a list with one per row, or None for dense. ``"auto"`` and
                ``"prompt"`` are decided by each call from its own prompt. What was picked from a
                prompt, as an output has it as ``picked``, stands for its rows.

        Raises:
            UnknownNameError: An unknown domain.
            PathwaysError: ``"auto"``, but the pathways do not know their domains' text.
        """
        asks = asks_router(domain) or asks_prompt(domain)
        if asks_router(domain):
            self._router_for(domain)
        if asks_prompt(domain):
            self._check_pickable(domain)
        chosen, picked = (None, None) if asks else self._resolve_any(domain)
        with self._holding(chosen, expand=False, picked=picked) as choice:
            choice.asked = domain if asks else None
            yield self

    @contextmanager
    def _holding(
        self, chosen: int | Tensor | None, *, expand: bool, picked: Picking | None = None
    ) -> Iterator[Choice]:
        """Make a choice for all passes on this thread within the block."""
        if chosen is not None or has_own_dense(self.config.executor):
            self._look_at_weights()
        name, hold = self.config.executor, self._attachment.hold
        if picked is not None:
            choice = self._attachment.hold_picked(chosen, name, picked, expand=expand)
        else:
            choice = hold(chosen, name, plain=self._is_compiled, expand=expand)
        try:
            yield choice
        finally:
            self._attachment.end(choice)

    @property
    def _is_compiled(self) -> bool:
        """Whether calls run a graph."""
        traced = hasattr(self.forward, "_torchdynamo_orig_callable")
        return bool(traced or self._compiled_call_impl)

    def _resolve(self, domain: Named) -> int | Tensor | None:
        """Resolve names to indices; controls come after the domains."""
        if self._partial is not None:
            self._partial.check(domain)
        elif _names_one(domain):
            self._check_has_pathways("it cannot compute a domain's part of them")
        controls = [] if self._pathways is None else list(self._pathways.controls)
        return resolve_domain(domain, self.domains, controls)

    # -- forward ----------------------------------------------------------------------------

    def _asked(self, domain: Domain | Unset) -> Any:
        """Return what a call asks for, or else the scope or the model does."""
        if not isinstance(domain, Unset):
            return domain
        ambient = find_choice(self._attachment.key)
        return self.config.default_domain if ambient is None else ambient.asked

    def _resolve_any(self, domain: Domain) -> tuple[int | Tensor | None, Picking | None]:
        """Return what a domain stands for, and what has picked it if it was picked."""
        if isinstance(domain, Picked):
            return self._rows_of(domain), domain.picking
        return self._resolve(domain), None

    def _chosen(self, domain: Domain | Unset) -> tuple[int | Tensor | None, bool, Picking | None]:
        """Return what a call that names ``domain`` computes, and whether its rows may expand.

        And what has picked it from a prompt, if that is what it computes.
        """
        ambient = find_choice(self._attachment.key) if isinstance(domain, Unset) else None
        if ambient is None:
            named = self.config.default_domain if isinstance(domain, Unset) else domain
            chosen, picked = self._resolve_any(named)
            return chosen, False, picked
        if ambient.pathway is None and self._partial is not None:
            self._partial.check(None)
        return ambient.pathway, ambient.expand, ambient.picked

    def enter_forward(
        self, domain: Domain | Unset, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Choice:
        """Make the choice for one forward pass; ``leave_forward`` takes it back."""
        if "guard" in kwargs:
            raise PathwaysError(
                "A guard watches a text while it is generated: pass guard= to model.generate, and "
                "leave it out of a single pass."
            )
        routed = self._route_call(domain, args, kwargs)
        domain = domain if routed is None else agreed(routed)
        decided = self._pick_from(domain, args, kwargs)
        call = self._call_within(domain) if decided is None else decided.picking
        if call is not None:
            choice = self._begin_call(call, args, kwargs)
        else:
            chosen, expand, picked = self._chosen(domain)
            chosen = self._fit(chosen, batch_size(args, kwargs), expand=expand)
            picked = None if chosen is None else picked
            # generate has looked at the weights, for all its steps
            choice = self._attachment.begin(
                chosen, self.config.executor, looked=expand, picked=picked
            )
        choice.routed = routed if decided is None else decided
        return choice

    def _fit(self, chosen: int | Tensor | None, batch: int, *, expand: bool) -> int | Tensor | None:
        """Return what computes the rows of a batch, on the model's device."""
        if isinstance(chosen, Tensor):
            chosen = fit_rows(chosen, batch, expand=expand)
        if isinstance(chosen, Tensor) and self.device.type != "meta":  # where all is offloaded
            chosen = chosen.to(self.device)
        return chosen

    def leave_forward(self, choice: Choice) -> None:
        """Take back what ``enter_forward`` did."""
        self._attachment.end(choice)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Set it as the base does, with a function under which recomputation keeps the choice."""
        if gradient_checkpointing_func is not None:
            check_checkpointing(self.config.ffn, gradient_checkpointing_func)
            kwargs["gradient_checkpointing_func"] = CheckpointedChoices(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the base's class, since the derived one is made at run time.

        Raises:
            UnsupportedModelError: The weights are sharded.
        """
        check_whole(
            self,
            "and a copy would compute with this model's leaves. Save it with save_pretrained, and "
            "load it again.",
        )
        own = type(self.config).__bases__[1]
        return _new_model, (type(self).__bases__[1], own), self.__dict__


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the rows of a call's main input; 1 without any, as ``generate`` starts from BOS."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    for value in (*args[:1], *named):
        if isinstance(value, Tensor):
            return int(value.shape[0])
    return 1


def _names_one(domain: Any) -> bool:
    """Whether a call's ``domain`` asks for anything but dense passes."""
    names = domain if isinstance(domain, list | tuple) else [domain]
    return any(name is not None for name in names)


def made_class(base: type[PreTrainedModel], config_class: type[SparsePathwaysConfig]) -> Any:
    """Return the class with pathways of a base's class."""
    from hf_sparse_pathways.modeling.classes import model_class_for

    return model_class_for(base, config_class)


def _new_model(base: type[PreTrainedModel], config_base: type[PreTrainedConfig]) -> Any:
    made = made_class(base, config_class_for(config_base))
    return made.__new__(made)
