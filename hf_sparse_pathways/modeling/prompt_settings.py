"""How ``domain="prompt"`` picks neurons: what a configuration holds of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.ffn.prompt_rules import RULES
from hf_sparse_pathways.shares import is_number


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How neurons are picked from a prompt.

    Attributes:
        sparsity: Fraction of each block's neurons that is left out after the prompt.
        rule: A name in ``RULES``.

    Raises:
        PathwaysError: The sparsity is out of range.
        UnknownNameError: There is no such rule.
    """

    sparsity: float = 0.5
    rule: str = "refit"

    def __post_init__(self) -> None:
        if not is_number(self.sparsity) or not 0.0 <= self.sparsity < 1.0:
            raise PathwaysError(
                "The sparsity of prompt pathways is the fraction of neurons that is left out, at "
                f"least 0 and less than 1; got {self.sparsity!r:.200}."
            )
        if not isinstance(self.rule, str) or self.rule not in RULES:
            raise UnknownNameError("rule of prompt pathways", self.rule, RULES)

    @classmethod
    def from_dict(cls, saved: Any) -> Self:
        """Build from what a configuration holds; None stands for the defaults.

        Raises:
            PathwaysError: It holds something else.
        """
        fields = {} if saved is None else saved
        if not isinstance(fields, Mapping) or not {*fields} <= {"sparsity", "rule"}:
            raise PathwaysError(
                f"Settings of prompt pathways are 'sparsity' and 'rule', got {saved!r:.200}."
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return what a configuration holds."""
        return asdict(self)
