"""What a data set's tables mean, as TOML: ours on the left, theirs on the right.

Each file in `presets/` is such a mapping of a public data set; `films.toml` beside a table is the
user's own, and may build on a preset: see data/README.md, and `mapping.schema.toml` for its keys.
"""

import functools
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

from ..base.errors import InputError
from ..base.findings import NO_FINDINGS, spelled_twice
from .cells import read_text, read_top, spreadsheet_in
from .toml import in_line, line_of, put_upon, rename, texts

MAPPING_NAME = "films.toml"
DICOM = "dicom:"  # before a keyword, in place of a column: from the films' headers
PRESETS = Path(__file__).with_name("presets")
SCHEMA = tomllib.loads(Path(__file__).with_name("mapping.schema.toml").read_text())
# What [columns] may name, and the column of our rows that it becomes.
COLUMNS = {name: name for name in SCHEMA["$defs"]["columns"]["properties"]}
COLUMNS |= {"image": "image_index", "patient": "patient_id"}


class Wrong(InputError):
    """What is wrong in a mapping, and at which key of which section."""

    def __init__(self, section: str, key: str, told: str) -> None:
        super().__init__(told)
        self.section, self.key = section, key


@dataclass(frozen=True)
class Mapping:
    """A mapping as read. `name` is "own" or the preset's; `words` are by their spelling.

    With [labels] `words` are those of one column, in lower case: of a finding, "" for a word that
    says nothing, "none" for one that says that there is no finding, "unknown" for one that leaves
    open what the others do not name. Without, they are columns of marks.
    """

    name: str
    file: Path
    given: dict[str, Any]
    words: dict[str, str]

    def section(self, name: str) -> dict[str, Any]:
        """Return a section, empty if the mapping has none."""
        return self.given.get(name, {})

    @property
    def findings(self) -> list[str]:
        """The findings that the mapping names, in its order."""
        return list(self.given["findings"])

    def tables(self, folder: Path, of: str = "tables") -> dict[str, list[Path]]:
        """Return the files that each of the tables, or of those to join, may be; best first."""
        if "table" in self.given and of == "tables":
            return {"": [folder / self.given["table"]]}
        found = {}
        for key in self.section(of):
            patterns = [p + end for p in key.split("|") for end in ("", ".gz")]
            files = [path for p in patterns for path in sorted(folder.glob(p))]
            found[key] = list(dict.fromkeys(files))
        return found

    def missing(self, folder: Path) -> list[str] | None:
        """Name the columns that the folder's tables lack; None where it has no such table."""
        if folders := texts(self.given.get("folders", [])):
            there = [any((folder / one).is_dir() for one in name.split("|")) for name in folders]
            return [] if all(there) else None
        files = [paths[0] for of in ("tables", "join") for paths in self.tables(folder, of).values()
                 if paths]  # fmt: skip
        if not any(self.tables(folder).values()):
            return None
        loose = self.given.get("loose", False)
        there = set().union(*(read_top(file, loose) for file in files))
        return [names[0] for _, _, names in self.needed() if not there & {*names}]

    def tags(self) -> dict[str, str]:
        """Return by column of ours, or of [keep], the DICOM keyword that it comes from."""
        given = self.section("optional") | self.section("columns")
        named = {name: texts(value)[0] for name, value in given.items()}
        named |= {name: name for name in self.section("keep") if name.startswith(DICOM)}
        return {n: v.removeprefix(DICOM) for n, v in named.items() if v.startswith(DICOM)}

    def needed(self) -> list[tuple[str, str, list[str]]]:
        """List the columns that must be there: section and key that name them, and spellings."""
        tags = self.tags()
        found = [("keep", name, [name]) for name in self.section("keep") if name not in tags]
        for key, value in self.section("columns").items():
            parts = re.findall(r"\{(.*?)\}", texts(value)[0])
            names = [[part] for part in parts] or [texts(value)]
            found += [("columns", key, name) for name in names if key not in tags]
        found += [
            ("marks", "none", [name]) for name in texts(self.section("marks").get("none", []))
        ]
        if labels := self.section("labels"):
            return [*found, ("labels", "column", [labels["column"]])]
        theirs = {name: [c for c, f in self.words.items() if f == name] for name in self.findings}
        return [*found, *(("findings", name, columns) for name, columns in theirs.items())]

    def fault(self, section: str, key: str, told: str) -> InputError:
        """Return an error about a key, which may be the preset's on which the mapping builds."""
        return _located(Wrong(section, key, told), self.file, PRESETS / f"{self.name}.toml")

    def to_write(self, section: str, lines: dict[str, Any]) -> str:
        """Say which lines to write under a section, and in which file: never in a preset."""
        said = " and ".join(f"`{in_line(key, value)}`" for key, value in lines.items())
        where = str(self.file)
        if self.file.name != MAPPING_NAME:
            where = f"a {MAPPING_NAME} in the data's folder, below `{in_line('preset', self.name)}`"
        return f"write {said} under `[{section}]` in {where}"

    def to_rename(self, old: str, new: str) -> str:
        """Say what to write so that a finding has another name."""
        given = self.given["findings"]
        value = given[old] if isinstance(given, dict) else old
        return f"{self.to_write('findings', {new: value})}, and nothing for {old!r}"


@functools.cache
def presets() -> dict[str, Mapping]:
    """Read all presets, by name."""
    return {path.stem: _mapping(path, path.stem) for path in sorted(PRESETS.glob("*.toml"))}


def candidates(folder: Path) -> list[Mapping]:
    """Return the presets that a folder may be, by its files' names and columns.

    Where no table has all columns of any, those of which a table has at least the name.
    """
    found = [(one, one.missing(folder)) for one in presets().values()]
    named = [(one, missing) for one, missing in found if missing is not None]
    return [one for one, missing in named if not missing] or [one for one, _ in named]


def find_mapping(folder: Path) -> Mapping:
    """Return the mapping of a folder: its own, else the one preset that it can be.

    Raises InputError where there is none, or more than one.
    """
    path = folder / MAPPING_NAME
    if path.exists():
        return _mapping(path, "own")
    found = candidates(folder)
    names = " or ".join(one.name for one in found)
    if len(found) == 1:
        return found[0]
    todo = (
        f'write {MAPPING_NAME} with a line such as preset = "{found[0].name if found else "nih"}"'
    )
    raise InputError(f"{folder}: its tables may be those of {names or 'no known data set'}; {todo}")


def _mapping(path: Path, name: str) -> Mapping:
    """Read and check a mapping; InputError names the file, the key and its line."""
    text = read_text(path)
    try:
        given = tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); see data/README.md") from None
    try:
        own = given if path.name == MAPPING_NAME else {}
        if "preset" in own:
            name = given["preset"]
            if str(name) not in presets():
                raise Wrong("", "preset", f"preset = {name!r}; known: {', '.join(presets())}")
            given = put_upon(presets()[name].given, own)
        _check_keys(given)
        if "preset" in own and isinstance(own.get("findings"), dict):
            given = rename(presets()[name].given, own["findings"], given)
        _check_findings(given)
        _check_columns(given)
        _check_marks(given)
        mapping = Mapping(name, path, given, _words(given))
        _check_tables(mapping, own.get("tables", {}))
    except Wrong as error:
        raise _located(error, path, PRESETS / f"{name}.toml") from None
    return mapping


def _located(error: Wrong, *files: Path) -> InputError:
    """Say the first file that has what is wrong, and the line: of its key, else of its section."""
    texts_of = {file: read_text(file) for file in files if file.is_file()}
    for section, key in ((error.section, error.key), ("", error.section)):
        for file, text in texts_of.items():
            if line := line_of(text, section, key):
                return InputError(f"{file}: {error} (line {line})")
    return InputError(f"{files[0]}: {error}")


def _check_keys(given: dict[str, Any]) -> None:
    """Raise Wrong for an unknown or a missing key, or one that holds something else."""
    checker = Draft202012Validator(SCHEMA, format_checker=FormatChecker(["regex"]))
    for error in sorted(checker.iter_errors(given), key=lambda error: list(map(str, error.path))):
        path = [part for part in error.path if isinstance(part, str)]
        known, section = error.schema.get("properties", {}), ".".join(path)
        where = f" in [{section}]" if section else ""
        if error.validator == "additionalProperties":
            key = next(key for key in error.instance if key not in known)
            raise Wrong(section, key, f"unknown {key!r}{where}; known: {', '.join(known)}")
        if error.validator == "required":
            key = next(key for key in error.validator_value if key not in error.instance)
            raise _lacks(section, key)
        key, value = path[-1], error.instance
        if isinstance(error.path[-1], int):
            value = given[path[0]][key]
        wanted = error.schema["title"].format(key=key)
        raise Wrong(".".join(path[:-1]), key, f"{key} = {value!r}; give {wanted}")
    if not given.keys() & {"table", "tables", "folders"}:
        raise _lacks("", "table")
    if "labels" in given and not given.get("several") and "separator" not in given["labels"]:
        raise _lacks("labels", "separator")


def _check_columns(given: dict[str, Any]) -> None:
    """Raise Wrong for a key that is for a column which is not named, or that nothing heeds."""
    named = given["columns"] | given.get("optional", {})
    for part in ("extract", "values"):
        for key in given.get(part, {}):
            if key not in named and not (key == "labels" and "labels" in given):
                told = f"{key!r} in [{part}] is none of those in [columns]: {', '.join(named)}"
                raise Wrong(part, key, told)
    if given.keys() >= {"table", "tables"}:
        raise Wrong("", "table", "table and [tables]; give one of them")
    if "born" in named and "date" not in named:
        raise Wrong("columns", "born", "born gives no age without date; name that column, too")
    if "readers" in given and "reader" not in named:
        raise Wrong("", "readers", "readers wants the column of the reader; add it to [columns]")
    if "reader" in named and not given.get("several"):
        raise Wrong("columns", "reader", "reader wants several = true, a row for each of them")


def _check_marks(given: dict[str, Any]) -> None:
    """Raise Wrong for a mark of two meanings, and for a finding that is none of those named."""
    marks, seen = given.get("marks", {}), {}
    for kind in ("present", "absent", "uncertain"):
        for mark in texts(marks.get(kind, [])):
            if mark in seen:
                raise Wrong("marks", kind, f"{mark!r} is {seen[mark]} and {kind}; give it once")
            seen[mark] = kind
    for name in texts(marks.get("spared", [])):
        if name not in given["findings"]:
            raise Wrong("marks", "spared", f"spared = {name!r}, which is none of [findings]")
    labels = given.get("labels", {})
    words = [word for key in ("none", "ignore", "unknown") for word in texts(labels.get(key, []))]
    for theirs, ours in given.get("aliases", {}).items():
        if ours not in [*given["findings"], *words]:
            told = f"{theirs} = {ours!r}, which is none of [findings]"
            if "preset" in given and theirs in presets()[given["preset"]].section("aliases"):
                told = f"findings, without {ours!r}; choose some by the parameter `findings`"
                raise Wrong("", "findings", f"{told}; [findings] renames and adds, upon a preset")
            raise Wrong("aliases", theirs, told)


def _lacks(section: str, key: str) -> Wrong:
    """Return the error for a missing key."""
    if key in ("findings", "columns"):
        return Wrong("", key, f"[{key}] is missing or empty; add it (see data/README.md)")
    where = f"[{section}] has no" if section else "no"
    return Wrong(section, key, f'{where} {key}; add {key} = "..." (see data/README.md)')


def _check_findings(given: dict[str, Any]) -> None:
    """Raise Wrong where there is no finding, or one with a name that cannot be one."""
    for name in given["findings"]:
        plain = isinstance(name, str) and re.fullmatch(r"\w([\w /()-]{0,58}[\w)])?", name)
        if not plain or name in {*NO_FINDINGS, "none", "unknown", "mean"}:
            told = f"[findings] {name!r}: no name for a finding; choose another"
            raise Wrong("findings", str(name), f"{told}, of at most 60 letters and blanks")
    if pair := spelled_twice(given["findings"]):
        told = f"[findings] {pair[0]!r} and {pair[1]!r} are one finding; name it once"
        raise Wrong("findings", pair[1], told)


def _check_tables(mapping: Mapping, named: Iterable[str]) -> None:
    """Raise Wrong where a table that an own mapping names itself is not there."""
    folder = mapping.file.parent
    for key, files in mapping.tables(folder).items():
        if key in ("", *named) and not any(file.exists() for file in files):
            there = ", ".join(sorted(p.name for p in folder.glob("*.csv*"))) or "none"
            there += spreadsheet_in(folder)
            told = f"table {key or mapping.given['table']!r} is not there; tables beside it: "
            raise Wrong("tables" if key else "", key or "table", told + there)


def _words(given: dict[str, Any]) -> dict[str, str]:
    """Map their words, or columns, to our findings; see `Mapping`."""
    labels, findings = given.get("labels", {}), given["findings"]
    if isinstance(findings, list):
        findings = {name: name for name in findings}
    pairs = list(findings.items())
    pairs += [(ours, theirs) for theirs, ours in given.get("aliases", {}).items()]
    ours_of = {"none": "none", "ignore": "", "unknown": "unknown"}
    pairs += [(ours, labels[key]) for key, ours in ours_of.items() if key in labels]
    words: dict[str, str] = {}
    for ours, value in pairs:
        for word in value if isinstance(value, list) and labels else [value]:
            if not isinstance(word, str) or not word.strip():
                wanted = 'a text, or a list such as ["a", "b"]' if labels else "one column's name"
                raise Wrong("findings", ours, f"{ours or 'ignore'} = {value!r}; give {wanted}")
            word = word.strip().lower() if labels else word
            if words.get(word, ours) != ours:
                raise Wrong("findings", ours, f"{word!r} stands for two things; name it once")
            words[word] = ours
    none = {name.lower() for name in texts(labels.get("none", []))}
    return {word: "none" if ours.lower() in none else ours for word, ours in words.items()}
