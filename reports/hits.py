"""A page of the hits of some queries, as one HTML file without scripts."""

import os
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from reports.pages import TEMPLATES, as_data_uri
from retrieval.search import Answer, Searcher

THUMB = 220  # pixels, the longer side


def write_page(searcher: Searcher, answers: Sequence[Answer], path: Path | None = None) -> Path:
    """The page, in `path` or a temporary file."""
    if path is None:
        handle, name = tempfile.mkstemp(".html", "blip-hits-")
        os.close(handle)
        path = Path(name)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    pictures = {hit.number: thumbnail(searcher, hit.number)
                for answer in answers for hit in (*answer.contrast, *answer.reranked)}  # fmt: skip
    page = environment.get_template("hits.html").render(answers=answers, pictures=pictures)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def thumbnail(searcher: Searcher, number: int) -> str:
    """A small picture as a data URI; '' when it cannot be read any more."""
    try:
        image = searcher.store.load(searcher.entries[number].name)
    except (ValueError, OSError):
        return ""
    image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return as_data_uri(image)


def show(path: Path) -> None:
    """Open the page in the browser, and say where it is."""
    print(path)
    webbrowser.open(path.as_uri())
