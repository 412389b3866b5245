"""Texts from outside, such as names of films, views and hospitals, shown as they are."""

import html
import re
from collections.abc import Iterable

# What Markdown reads as more than itself; the last two keep addresses from becoming links.
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$@]|(?<=:)/(?=/)|(?<=www)\.)")


def plain(text: object) -> str:
    """Escape a text for Markdown, so that it shows as it is: no tag, link, table or formula."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def bullets(lines: Iterable[object]) -> str:
    """Write sentences that may hold names from outside as a Markdown list."""
    return "\n".join(f"- {plain(line)}" for line in lines)
