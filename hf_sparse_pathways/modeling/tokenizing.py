"""The tokenizer of a model with pathways: beside it, or where pathways lie alone their base's."""

from typing import TYPE_CHECKING, Any

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.tokenization_auto import AutoTokenizer, get_tokenizer_config

if TYPE_CHECKING:
    from os import PathLike


def load_tokenizer(source: "str | PathLike[str]") -> Any:
    """Load the tokenizer of a model's folder or Hub id.

    Args:
        source: Where the model is. Where there are pathways alone and no tokenizer beside them,
            the base's is loaded, at the base's revision.

    Raises:
        OSError: There is none.
    """
    weights_of = getattr(AutoConfig.from_pretrained(source), "weights_of", None)
    if weights_of is None or get_tokenizer_config(source):
        return AutoTokenizer.from_pretrained(source)
    name, revision = weights_of
    return AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))
