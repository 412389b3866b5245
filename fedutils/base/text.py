"""Texts from outside, such as names of films, views and hospitals, shown as they are."""

import html
import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# What Markdown reads as more than itself; the last two keep addresses from becoming links.
ESCAPED = re.compile(r"[\\`*_{}\[\]#+!|~$@]|(?<=\\)[()]|(?<=:)/(?=/)|(?<=www)\.")
FIRST = re.compile(r"^(\d*)([-=.)])")  # begins an item of a list, or underlines a heading


def plain(text: object) -> str:
    """Escape a text for Markdown, so that it shows as it is: no tag, link, table or formula."""
    marked = ESCAPED.sub(r"\\\g<0>", html.escape(" ".join(str(text).split()), quote=False))
    return FIRST.sub(r"\1\\\2", marked)


def bullets(lines: Iterable[object]) -> str:
    """Write sentences that may hold names from outside as a Markdown list."""
    return "\n".join(f"- {plain(line)}" for line in lines)


def templates(room: str) -> Environment:
    """Return the templates beside a room, its `__file__`; a name without a value is an error."""
    look = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    files = FileSystemLoader(Path(room).parent)
    found = Environment(loader=files, undefined=StrictUndefined, **look)
    found.filters |= {"as": format, "plain": plain, "bullets": bullets}
    return found
