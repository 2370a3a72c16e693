"""What domains and controls may be called."""

import re

from hf_sparse_pathways.errors import PathwaysError

POOLED = "pooled"
"""Name of the control that is selected from all domains' statistics together."""

AUTO = "auto"
"""In place of a domain's name: whichever the prompt is of."""

PROMPT = "prompt"
"""In place of a domain's name: the neurons that the prompt itself has used."""

RESERVED = (AUTO, POOLED, PROMPT)

TUNED = "tuned: "
"""Before a domain's name: the control that is the dense model, tuned as the domain was healed."""

_DOMAIN_NAME = re.compile(r"\w[\w .+-]{0,63}")


def check_domain_name(name: object) -> None:
    """Check that a name can be a domain's.

    Raises:
        PathwaysError: It cannot.
    """
    if not isinstance(name, str) or not _DOMAIN_NAME.fullmatch(name) or name in RESERVED:
        raise PathwaysError(
            f"{name!r} cannot be a domain's name. Use 1 to 64 letters, digits, spaces or ._+- "
            f"that start with a letter or digit; {', '.join(map(repr, RESERVED))} are reserved."
        )
