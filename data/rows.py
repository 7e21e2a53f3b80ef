"""Annotation files to checked rows: a JSON list, JSON Lines or CSV, with the keys image, caption and maybe image_id.

Every message names the file, the row (counted from 1; in JSON Lines it is the line) and the key.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One checked row: `number` counts from 1 (the line in JSON Lines; a CSV header does not count)."""

    number: int
    image: str
    captions: list[str]
    image_id: str | None

    @property
    def group(self) -> tuple[str | None, str]:
        """What makes images one: the image_id or, without one, the path."""
        return (None, self.image) if self.image_id is None else ("id", self.image_id)


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON list, JSON Lines or CSV file, checked; ValueError names file, row and key."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"annotation file {file} cannot be read ({error.strerror}): set ann_root, or the file's key, in the config "
            "(relative paths are looked up from the working directory, then from the repository)"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    rows = [_check_row(file, number, row) for number, row in _parse(file, text)]
    if not rows:
        raise ValueError(f"{file} has no rows: it needs at least one, with the keys image and caption")
    return rows


def _parse(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Numbered rows, unchecked, of whichever of the three formats the text is in."""
    start, header = text.lstrip()[:1], text.lstrip().partition("\n")[0]
    if file.suffix.lower() == ".csv" or (start not in "[{<" and {"image", "caption"} <= set(header.strip().split(","))):
        yield from _parse_csv(file, text)
    elif start == "<":
        raise ValueError(f"{file} is an HTML page, not annotations: a download got a web page instead; fetch it again")
    elif start == "[":
        yield from enumerate(_json(file, text, ""), 1)
    elif start == "{":
        lines = text.split("\n") if header.rstrip().endswith("}") else [text]
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        for number, line in numbered:
            row = _json(file, line, f", row {number}" if len(numbered) > 1 else "")
            if len(numbered) == 1 and "image" not in row:
                keys = ", ".join(list(row)[:5]) or "empty"
                raise ValueError(f"{file} is one object ({keys}), not a list of rows with the keys image and caption")
            yield number, row
    elif start:
        raise ValueError(f"{file} is neither a JSON list, nor JSON Lines, nor CSV with the columns image and caption")


def _json(file: Path, text: str, row: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{file}{row} is nested too deeply to be annotations") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if not row else f"column {error.colno}"
        cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        advice = "it ends too early, so fetch or write it again" if cut else "correct it there"
        raise ValueError(f"{file}{row} is not valid JSON ({error.msg} at {where}): {advice}") from None


def _parse_csv(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader, number = csv.DictReader(io.StringIO(text, newline=""), strict=True), 0
    lacking = [key for key in ("image", "caption") if key not in (reader.fieldnames or ())]
    if lacking and text.strip():
        raise ValueError(f"{file} has no column {lacking[0]!r}: its first line must name the columns image and caption")
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise ValueError(
                    f"{file}, row {number} has {'more' if None in row else 'fewer'} cells than the header names: "
                    "put a caption with commas into double quotes"
                )
            yield number, {key: value for key, value in row.items() if key != "image_id" or value}
    except csv.Error as error:
        raise ValueError(f"{file}, row {number + 1} is not valid CSV ({error})") from None


def _check_row(file: Path, number: int, row: Any) -> Row:
    """A row whose keys and types are right, with a path that stays under image_root."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{file}, row {number} {what}")

    if not isinstance(row, dict):
        raise wrong(f"is {_kind(row)}, not an object with the keys image and caption")
    for key in ("image", "caption"):
        if key not in row:
            raise wrong(f"has no key {key!r}, only {', '.join(map(str, row)) or 'nothing'}")
    image, captions, image_id = row["image"], row["caption"], row.get("image_id")
    if not isinstance(image, str) or not image.strip():
        raise wrong(f"needs under 'image' a path relative to image_root, not {_kind(image)}")
    if image[0] in "/\\~" or image[1:2] == ":" or ".." in image.replace("\\", "/").split("/") or "\0" in image:
        raise wrong(f"needs under 'image' a path inside image_root, not absolute and without '..', not {image[:80]!r}")
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise wrong(f"needs under 'caption' a text or a list of texts, not {_kind(row['caption'])}")
    if image_id is not None and (isinstance(image_id, bool) or not isinstance(image_id, int | str)):
        raise wrong(f"needs under 'image_id' a text or a whole number, not {_kind(image_id)}")
    return Row(number, image, captions, None if image_id is None else str(image_id))


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        strange = [item for item in value if not isinstance(item, str)]
        return f"a list with {_kind(strange[0])} in it" if strange else "an empty list" if not value else "a list"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, dict):
        return "an object"
    return f"the value {json.dumps(value)}"
