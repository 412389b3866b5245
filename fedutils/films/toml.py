"""What mappings hold, as TOML: found, written, and put upon one another."""

import json
import re
from collections.abc import Sequence
from typing import Any


def texts(value: str | Sequence[str]) -> list[str]:
    """Return a text, or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def in_line(key: str, value: str | Sequence[str]) -> str:
    """Write a key with its text, or texts; what cannot be printed is escaped."""
    bare = re.fullmatch(r"[A-Za-z0-9_-]+", key)
    key, text = (
        json.dumps(one, ensure_ascii=not "".join(one).isprintable()) for one in (key, value)
    )
    return f"{key[1:-1] if bare else key} = {text}"


def line_of(text: str, section: str, key: str) -> int:
    """Return the line of a key in a TOML text, 0 if it has none."""
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\]]+)\]", line):
            here = header[1]
        named = re.match(rf"\s*\[?[\"']?{re.escape(key)}[\"']?\s*[=\]]", line) if key else None
        if named and here in (section, key):
            return number
    return 0


def put_upon(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Put what a mapping says over what its preset does, section by section."""
    base = {key: value for key, value in base.items() if key != "tables" or "table" not in own}
    both = {key: base[key] | value for key, value in own.items()
            if isinstance(value, dict) and isinstance(base.get(key), dict)}  # fmt: skip
    return base | own | both


def rename(base: dict[str, Any], own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Put findings of one's own, in `given`, in the places of those of a preset that they name.

    By its name, its column or its only word; all that the preset says of it holds for them then.
    """
    known, aliases = base["findings"], base.get("aliases", {})
    known = known if isinstance(known, dict) else {name: name for name in known}
    meant = {value.lower(): name for name, value in known.items() if isinstance(value, str)}
    meant |= {word.lower(): name for word, name in aliases.items()}
    meant |= {name.lower(): name for name in known}
    meant = {word: name for word, name in meant.items() if name in known.keys() - own.keys()}
    called = {meant[word.lower()]: ours for ours, value in own.items() for word in texts(value)
              if word.lower() in meant}  # fmt: skip
    findings = {called.get(name, name): value for name, value in known.items()}
    for ours, value in own.items():
        theirs = [known.get(meant.get(word.lower()), word) for word in texts(value)]
        words = list(dict.fromkeys(word for one in theirs for word in texts(one)))
        findings[ours] = words[0] if len(words) == 1 else words
    aliases = {word: called.get(name, name) for word, name in given.get("aliases", {}).items()}
    marks = given.get("marks", {})
    spared = [called.get(name, name) for name in texts(marks.get("spared", []))]
    return given | {"findings": findings, "aliases": aliases, "marks": marks | {"spared": spared}}
