"""Annotation files as people have them, recognised by their content, to rows with this program's own keys.

docs/data.md has the table of what is read. Nothing here checks values: `data.rows` does.

Sources: the layouts of Karpathy & Fei-Fei (CVPR 2015), COCO captions (Chen et al., 2015), Flickr8k and Flickr30k
(Hodosh et al., 2013; Young et al., 2014), CUHK-PEDES (Li et al., CVPR 2017), open_clip's tables and Hugging Face's
`imagefolder`.
"""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from data.keys import KEY_OF, Dialect, Numbered, caption_lines, did_you_mean, numbered, own_keys, plain

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
TOKEN_LINE = re.compile(r"([^\t\n]+)#\d+\t(.*)")  # Flickr8k.token.txt
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")  # of an imagefolder


def read_dialect(file: Path, text: str) -> Dialect:
    """The rows of whichever format the text is in; ValueError names the file, the row and what to do."""
    start, header = text.lstrip()[:1], text.strip("\r\n").partition("\n")[0]
    if start == "<":
        raise ValueError(f"{file} is an HTML page, not annotations: a download got a web page instead; fetch it again")
    if start == "[":
        return own_keys(file, list(enumerate(_json(file, text, ""), 1)))
    if start == "{":
        return _objects(file, text, header)
    if not start:
        return Dialect([], [])
    if TOKEN_LINE.match(header):
        return _token_lines(file, text)
    return _table(file, text, header)


def read_folder(folder: Path, image_root: Path) -> Dialect:
    """Pictures `key.jpg` with their captions in `key.txt`, one a line, anywhere below `folder`."""
    place, top = folder.resolve(), image_root.resolve()
    if not place.is_relative_to(top):
        raise ValueError(
            f"{folder} is a folder, so its pictures are read from it: put it under image_root {image_root}"
        )
    rows: Numbered = []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = {path.with_suffix(""): path for path in files if path.suffix == ".txt"}
    pictures: dict[Path, Path] = {}
    for path in files:
        if path.suffix.lower() in PICTURES:
            if path.with_suffix("") in pictures:
                raise ValueError(f"{folder}: {path.name} and {pictures[path.with_suffix('')].name} share one text file")
            pictures[path.with_suffix("")] = path
    for number, (stem, path) in enumerate(pictures.items(), 1):
        name = (place.relative_to(top) / path.relative_to(folder)).as_posix()  # of a link, its own name
        captions = caption_lines(read_text(texts[stem])) if stem in texts else []
        rows.append((number, {"image": name, "caption": captions}))
    lonely = [path.name for stem, path in sorted(texts.items()) if stem not in pictures]
    if lonely:
        raise ValueError(
            f"{folder}: {len(lonely)} text files have no picture beside them, the first is {lonely[0]}: add the "
            "pictures, or remove the texts"
        )
    if not any(row["caption"] for _, row in rows):
        raise ValueError(
            f"{folder} is a folder without annotations: it needs {' or '.join(METADATA)}, or pictures with texts of "
            "the same name (a.jpg, a.txt)"
        )
    return Dialect(rows, [f"{folder}: {len(rows)} pictures, each with the captions of the .txt beside it"])


def read_text(file: Path) -> str:
    """The text of a UTF-8 file; ValueError names the file and, for another encoding, the command that converts it."""
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"annotation file {file} cannot be read ({error.strerror}): set ann_root, or the file's key, in the config "
            "(relative paths are looked up from the working directory, then from the repository)"
        ) from None
    except UnicodeDecodeError as error:
        why = f"{file} is not UTF-8 text ({error.reason} at byte {error.start})"
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:200].count(0) > len(data[:200]) // 3:
            raise ValueError(f"{why} but looks like UTF-16: save it as UTF-8 ({_iconv(file, 'UTF-16')})") from None
        if b"\0" in data[:2000] or data[:2] in (b"PK", b"\x1f\x8b"):
            raise ValueError(f"{why} but binary: unpack it, or save it as UTF-8") from None
        near = " ".join(data[max(0, error.start - 12) : error.start + 12].decode("cp1252", "replace").split())
        raise ValueError(
            f"{why}. If {near!r} reads well, it is Latin-1: save it as UTF-8 ({_iconv(file, 'WINDOWS-1252')})"
        ) from None


def _iconv(file: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {file.name} > utf8_{file.name}"


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _json(file: Path, text: str, row: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"{file}{row} has the key {twice!r} twice in one object: keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{file}{row} is nested too deeply to be annotations") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if not row else f"column {error.colno}"
        cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        advice = "it ends too early, so fetch or write it again" if cut else "correct it there"
        if re.match(r"\s*[\]}]", text[error.pos :]) and text[: error.pos].rstrip().endswith(","):
            advice = "remove the comma before it"
        elif re.match(r",\s*[\]}]", text[error.pos :]):
            advice = "remove that comma"
        raise ValueError(f"{file}{row} is not valid JSON ({error.msg} at {where}): {advice}") from None


def _objects(file: Path, text: str, header: str) -> Dialect:
    """JSON Lines, or one object: Karpathy's layout, COCO's, or a single row."""
    lines = text.split("\n") if header.rstrip().endswith("}") else [text]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(numbered) > 1:
        return own_keys(file, [(number, _json(file, line, f", row {number}")) for number, line in numbered])
    data = _json(file, numbered[0][1], "")
    if isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list):
        return _coco(file, data["images"], data["annotations"])
    if isinstance(data.get("images"), list) and data["images"]:
        found = own_keys(file, list(enumerate(data["images"], 1)))
        return Dialect(found.rows, [f"{file}: Karpathy's layout of {data.get('dataset', 'a data set')}", *found.notes])
    if not {KEY_OF.get(plain(key)) for key in data} & {"image", "caption"}:
        keys = ", ".join(list(data)[:5]) or "empty"
        raise ValueError(f"{file} is one object ({keys}), not a list of rows with the keys image and caption")
    return own_keys(file, [(numbered[0][0], data)])


def _coco(file: Path, images: list, annotations: list) -> Dialect:
    """Official COCO captions: one row an image, whether it has captions or not."""
    captions: dict[Any, list] = {}
    try:
        for number, entry in enumerate(images, 1):
            if entry["id"] in captions:
                raise ValueError(f"{file}: image {number} has the id {entry['id']!r} of an image before it")
            captions[entry["id"]] = []
        for number, entry in enumerate(annotations, 1):
            if entry["image_id"] not in captions:
                raise ValueError(f"{file}: annotation {number} has an image_id, {entry['image_id']!r}, of no image")
            captions[entry["image_id"]].append(entry["caption"])
        rows = [
            (number, {"image": entry["file_name"], "caption": captions[entry["id"]]}
             | ({"split": entry["split"]} if "split" in entry else {}))
            for number, entry in enumerate(images, 1)
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        part = "image" if "file_name" in str(error) or "'id'" in str(error) else "image or annotation"
        raise ValueError(
            f"{file} has the layout of COCO, but {part} {number} lacks {error}: these must be captions, such as "
            "captions_val2014.json"
        ) from None
    return Dialect(rows, [f"{file}: COCO's layout, {len(rows)} images and {len(annotations)} captions"])


# ---- tables and lines -----------------------------------------------------------------------------------------------


def _token_lines(file: Path, text: str) -> Dialect:
    rows: Numbered = []
    for number, line in enumerate(text.split("\n"), 1):
        match = TOKEN_LINE.fullmatch(line.rstrip("\r"))
        if match:
            rows.append((number, {"image": match[1], "caption": match[2]}))
        elif line.strip():
            raise ValueError(f"{file}, row {number} is not `name.jpg#0<TAB>caption`, as the rows before it: correct it")
    return Dialect(rows, [f"{file}: lines of Flickr8k's kind, name#number and caption"])


def _table(file: Path, text: str, header: str) -> Dialect:
    """A table whose first line names its columns; the separator is the one that makes columns of that line."""
    declared = re.match(r"sep=(.)\r?\n", text.lstrip("\r\n"))  # Excel's own first line
    if declared:
        text, header = text.lstrip("\r\n")[declared.end() :], text.splitlines()[1] if "\n" in text else ""
    text = text.lstrip("\r\n")
    columns, separator = _columns(file, text, header)
    loose = separator == "|"  # such files come with loose quotation marks
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        skipinitialspace=not loose,
        quoting=csv.QUOTE_NONE if loose else csv.QUOTE_MINIMAL,
        strict=True,
    )
    rows: Numbered = []
    number = mended = 0
    try:
        next(reader)
        for number, cells in enumerate((cells for cells in reader if any(cell.strip() for cell in cells)), 1):
            if separator == "|":
                cells, mended = _mend(cells, columns, mended)
            while len(cells) > len(columns) and not cells[-1].strip():  # Excel's empty last columns
                cells = cells[:-1]
            if len(cells) != len(columns):
                count = "more" if len(cells) > len(columns) else "fewer"
                remedy = f"put a text with {SEPARATORS[separator]} into double quotes"
                if len(cells) < len(columns):
                    remedy = f"every row needs {len(columns)}, if need be empty ones"
                raise ValueError(f"{file}, row {number} has {count} cells than the header names: {remedy}")
            rows.append((number, {key: _cell(cell, separator) for key, cell in zip(columns, cells, strict=True)}))
    except csv.Error as error:
        raise ValueError(f"{file}, row {number + 1} is not valid CSV ({error})") from None
    found = own_keys(file, rows, cells=True)
    notes = [f"{file}: a table separated by {SEPARATORS[separator]}"] * (separator != ",") + found.notes
    if mended:
        notes.append(f"{file}: {mended} rows lacked a bar between number and caption, and were read all the same")
    return Dialect(found.rows, notes)


def _columns(file: Path, text: str, header: str) -> tuple[list[str], str]:
    best: tuple[int, list[str], str] = (0, [], ",")
    for separator in SEPARATORS:
        try:
            columns = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True), [])
        except csv.Error:
            continue
        columns = [column.strip() for column in columns]
        while columns and not columns[-1]:  # Excel's empty last columns
            columns.pop()
        keys = {KEY_OF.get(plain(column)) or ("caption" if numbered(column) else None) for column in columns}
        if len(keys & {"image", "caption"}) > best[0]:
            best = len(keys & {"image", "caption"}), columns, separator
    found, columns, separator = best
    if found < 2 and file.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(
            f"{file} is neither a JSON list, nor JSON Lines, nor a table (CSV) with the columns image and caption"
        )
    for key in ("image", "caption"):
        if not any(KEY_OF.get(plain(column)) == key or (key == "caption" and numbered(column)) for column in columns):
            names = columns or next(csv.reader([header]), [])
            raise ValueError(
                f"{file} has no column {key!r}{did_you_mean(key, names)}: its first line must name the columns image "
                "and caption"
            )
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise ValueError(f"{file} has the column {twice[0]!r} twice: rename one (more captions: caption_2, caption_3)")
    return columns, separator


def _mend(cells: list[str], columns: list[str], mended: int) -> tuple[list[str], int]:
    """Flickr30k's results.csv has a line `name.jpg| 4   A dog runs`, without the bar after the number."""
    match = re.fullmatch(r"\s*(\d+)\s+(\S.*)", cells[-1]) if len(cells) == len(columns) - 1 == 2 else None
    return ([*cells[:-1], match[1], match[2]], mended + 1) if match else (cells, mended)


def _cell(cell: str, separator: str) -> str | None:
    cell = cell.strip() if separator == "|" else cell
    return cell if cell.strip() else None
