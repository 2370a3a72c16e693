"""Access tokens of the Hub: they stand in no message, log or card."""

import re

from hf_sparse_pathways.errors import PathwaysError

_TOKEN = re.compile(
    r"(Bearer\s+(?!\*)|\bhf_(?:oauth_|jwt_)?(?=[A-Za-z0-9]{20}))[^\s'\"]+", re.ASCII
)
"""A token has 34 letters and digits in a row; this package, and folders, begin with hf_, too."""


def check_token(token: object) -> None:
    """Check that a token can be sent: what sends it would repeat it in an error if it cannot.

    Raises:
        PathwaysError: It is a text with characters that no token has.
    """
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise PathwaysError(
            "The token has spaces, line breaks or other characters that no token has (it is not "
            "shown here). Copy it anew, or use `hf auth login`."
        )


def hide_tokens(text: str) -> str:
    """Return a text without the tokens that stand in it. Pure."""
    return _TOKEN.sub(r"\1***", text)
