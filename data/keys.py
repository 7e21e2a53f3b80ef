"""The names that people give to the keys of annotation rows, and this program's own, KEYS.

What is taken under another name, or not used, becomes a note.
"""

import ast
import difflib
import io
import json
import posixpath
import re
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

KEYS = ("image", "caption", "image_id", "split", "sentids")
OTHER_NAMES = {  # without case, '_', '-' and spaces
    "image": "filepath filename imgpath imagepath imgname imagename imagefile img path".split(),
    "caption": "captions sentences sentence title titles text texts comment comments".split(),
    "image_id": "imageid imgid personid id".split(),
    "split": [],
    "sentids": [],
}
KEY_OF = {key.replace("_", ""): key for key in KEYS} | {n: key for key, names in OTHER_NAMES.items() for n in names}
NEAR = 0.85  # likeness of two names from which one is taken for a slip of the other

Numbered = list[tuple[int, Any]]


class Dialect(NamedTuple):
    """Numbered rows with the keys of KEYS, unchecked (a row that is no object stays as it is), and what to tell."""

    rows: Numbered
    notes: list[str]


def own_keys(file: Path, rows: Numbered, cells: bool = False) -> Dialect:
    """Rows under the keys of KEYS, and notes of what was taken for which and what was not used.

    `cells`: values come from a table, where a list is a text and an empty cell is None.
    """
    counts = Counter(str(key) for _, row in rows if isinstance(row, dict) for key in row)
    folder = "filepath" if "filename" in counts and "filepath" in counts else ""  # Karpathy: both make the path
    source, unused = _choose(file, [key for key in counts if not folder or key != folder], counts)
    if not rows or not counts:
        return Dialect(rows, [])
    more = sorted((key for key in counts if numbered(key)), key=lambda key: int(re.findall(r"\d+$", key)[0]))
    found = [(number, _translate(row, source, folder, more, cells)) for number, row in rows]
    notes = []
    taken = [f"{name} as {key}" for key, name in source.items() if name != key]
    if source.get("image_id") == "id" and _several_ids(found):
        for _, row in found:
            row.pop("image_id", None)
        taken.remove("id as image_id")
        notes.append(f"{file}: the key id is not used: one image has several, so they number rows")
    if folder:
        taken.append(f"{folder} as the folder of {source['image']}")
    if more:
        taken.append(f"{', '.join(more)} as further captions")
    if taken:
        notes.insert(0, f"{file}: {', '.join(taken)}")
    if cells and (brackets := sum(_in_brackets(row) for _, row in found)):
        notes.append(
            f"{file}: {brackets} cells in brackets are neither a list of JSON nor one of Python, and are taken as "
            "text; if they are lists, put each text into quotes"
        )
    if unused := [f"{key or repr(key)} ({counts[key]} rows)" for key in unused if key not in more]:
        notes.append(f"{file}: keys that are not used: {', '.join(unused)}")
    return Dialect(found, notes)


def _choose(file: Path, names: list[str], counts: Counter) -> tuple[dict[str, str], list[str]]:
    """Which of the file's names stands for each key of KEYS, and the names that stand for none."""
    source: dict[str, str] = {key: key for key in KEYS if key in counts}
    for key in KEYS:
        others = [name for name in names if KEY_OF.get(plain(name)) == key and name != key]
        strong = [name for name in others if name != "id"] or others
        if key not in source and len(strong) > 1:
            raise ValueError(f"{file}: both {strong[0]} and {strong[1]} could be the {key}: call one of them {key}")
        if key not in source and strong:
            source[key] = strong[0]
    unused = [name for name in names if name not in source.values()]
    for name in unused:
        for key in ("image_id", "split"):  # a row does without them, so that a slip would go unseen
            likeness = difflib.SequenceMatcher(None, plain(name), plain(key)).ratio()
            if key not in source and likeness >= NEAR:
                raise ValueError(f"{file}: unknown key {name!r}, did you mean {key!r}? Rename it, or remove it")
    return source, unused


def _translate(row: Any, source: dict[str, str], folder: str, more: list[str], cells: bool) -> Any:
    if not isinstance(row, dict):
        return row
    found = {key: row[name] for key, name in source.items() if name in row}
    if cells:
        found = {key: value for key, value in found.items() if value is not None or key in ("image", "caption")}
    if "caption" in found:
        found["caption"] = _texts(found["caption"])
    if folder and isinstance(row.get(folder), str) and row[folder] and isinstance(found.get("image"), str):
        found["image"] = f"{row[folder]}/{found['image']}"
    extra = [text for name in more if row.get(name) is not None for text in _as_list(_texts(row[name]))]
    if "image" not in found or not (extra or "caption" in found):
        return {**row, **found}  # for a message that names what the row has
    if extra:
        found["caption"] = [*_as_list(found.get("caption")), *extra]
    return found


def _texts(value: Any) -> Any:
    """A caption, or the list that a text of it spells."""
    if isinstance(value, str):
        listed = list_in_cell(value)
        return value if listed is None else listed
    return [_sentence(item) for item in value] if isinstance(value, list) else value


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _in_brackets(row: Any) -> bool:
    """Whether a caption looks like a list that could not be read as one."""
    texts = _as_list(row.get("caption")) if isinstance(row, dict) else []
    return any(isinstance(text, str) and re.fullmatch(r"\s*(\[.*\]|\(.*\))\s*", text, re.DOTALL) for text in texts)


def _sentence(item: Any) -> Any:
    """Karpathy's sentences are objects with the text under `raw`."""
    return item["raw"] if isinstance(item, dict) and isinstance(item.get("raw"), str) else item


def _several_ids(rows: Iterable[tuple[int, Any]]) -> bool:
    first: dict[str, Any] = {}
    return any(
        isinstance(row, dict) and isinstance(row.get("image"), str)
        and first.setdefault(same_file(row["image"]), row.get("image_id")) != row.get("image_id")
        for _, row in rows
    )  # fmt: skip


def same_file(path: str) -> str:
    """One spelling for all spellings of a path: './a.png', 'x//a.png', backslashes, Unicode's composed form."""
    return unicodedata.normalize("NFC", posixpath.normpath(path.strip().replace("\\", "/")))


def plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def numbered(name: str) -> bool:
    """caption_2, Caption 3, text1: a further caption."""
    match = re.fullmatch(r"([a-z]+)\d+", plain(name))
    return bool(match) and KEY_OF.get(match[1] if match else "") == "caption"


def did_you_mean(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(names), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def caption_lines(text: str) -> list[str]:
    """The lines of a text that are not blank; a caption may hold U+2028 or U+0085, at which `splitlines` would cut."""
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def list_in_cell(cell: str) -> list[str] | None:
    """The texts of a list written into one cell, as JSON or as Python or numpy print it; None if it is no list."""
    cell = cell.strip()
    if not (cell.startswith(("[", "(")) and cell.endswith(("]", ")"))):
        return None
    try:
        found = [item for item in json.loads(cell) if item is not None]
        return found if all(isinstance(item, str) for item in found) else None
    except (ValueError, TypeError):
        pass
    try:
        parts = list(tokenize.generate_tokens(io.StringIO(cell.replace("\n", " ")).readline))
        texts = [ast.literal_eval(part.string) for part in parts if part.type == tokenize.STRING]
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    others = {part.string for part in parts if part.type not in (tokenize.STRING, tokenize.NEWLINE, tokenize.ENDMARKER)}
    only_texts = bool(texts) and all(isinstance(text, str) for text in texts)
    return texts if only_texts and others <= set("[](),") | {"None"} else None
