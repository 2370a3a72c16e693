"""What others wrote, on a terminal and in Markdown: it is shown, and not obeyed."""

import re

_ACTIVE = re.compile(r"[|<]")


def plain(text: str) -> str:
    """Return a text in one line without control characters, which are shown as escapes. Pure.

    A terminal would obey some of them; others reorder or hide what stands beside them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown_cell(text: str) -> str:
    """Return a text that stays within its cell of a Markdown table, and is no HTML. Pure."""
    return _ACTIVE.sub(r"\\\g<0>", plain(" ".join(text.split())))
