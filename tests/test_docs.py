"""README.md, docs/ and benchmarks/results/: what they name exists, and the Markdown renders."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks/results").glob("*.md"))]
ROOMS = "configs|transform|data|models|training|retrieval|checkpoints|reports|benchmarks|tests|docs"
ENDINGS = "py|md|yaml|json|txt|toml|zip|npz|png|html"
README_LINES, WIDTH = 160, 120
# A file of the repository, and perhaps a name in it: `models/itm.py:sample_negatives`.
REPO_FILE = re.compile(rf"(?<![\w./-])((?:{ROOMS})/[\w./-]*\.(?:{ENDINGS}))\b(?::([A-Za-z_][\w.]*))?")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> list[str]:
    """The lines of a page, empty where a fenced block is, so that their numbers stay."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.lstrip().startswith("```")
        lines.append("" if inside or fence else line)
        inside ^= fence
    assert not inside, f"{page}: a fenced block does not end"
    return lines


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = [line.lstrip("#").strip().lower() for line in prose(page) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def defined(path: Path) -> set[str]:
    """Names a Python file defines at its top level, and `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in getattr(node, "body", ())
                      if isinstance(node, ast.ClassDef) and isinstance(part, ast.FunctionDef)}  # fmt: skip
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_there_are_pages():
    assert len(PAGES) > 10


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(path), f"{target}: there is no such heading"


@every_page
def test_files_modules_and_names_exist(page):
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8"))
    text = re.sub(r"\]\([^)\s]+\)", "]", text)  # links are another test's
    for name, symbol in REPO_FILE.findall(text):
        assert (ROOT / name).is_file(), f"{name}: there is no such file"
        assert not symbol or symbol in defined(ROOT / name), f"{name} does not define {symbol}"
    for folder in re.findall(rf"(?:`|^)((?:{ROOMS})/[\w/]*)(?:`|  )", text, re.MULTILINE):
        assert (ROOT / folder).is_dir(), f"{folder}: there is no such folder"
    for name in re.findall(r"(?<![\w./*-])([\w-]+\.py)\b", text):
        assert (ROOT / "tests" / name if name.startswith("test_") else ROOT / name).is_file(), f"{name}: no such file"
    for module in re.findall(rf"-m ((?:{ROOMS})[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"-m {module}: no such module"


@every_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}: the Makefile has no such target"


@every_page
def test_options_exist(page):
    """Every --option of a train_retrieval.py command is one that the program has."""
    program = (ROOT / "train_retrieval.py").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for command in re.findall(r"train_retrieval\.py (--[^`\n]*)", text):
        for option in re.findall(r"(?<!\S)--\w+", command):
            assert f'"{option}"' in program, f"{option} in: {command}"


@every_page
def test_lines_are_not_too_wide(page):
    for number, line in enumerate(prose(page), 1):
        text = re.sub(r"\]\([^)\s]+\)", "]()", re.sub(r"https?://\S+", "", line))
        assert line.startswith("|") or len(text) <= WIDTH, f"line {number} has {len(text)} characters"


@every_page
def test_tables_are_well_formed(page):
    """A header, a separator, and as many cells in every row; a blank line before."""
    lines, start = ["", *prose(page), ""], None
    for number, line in enumerate(lines):
        if line.startswith("|") and start is None:
            start = number
        if not line.startswith("|") and start is not None:
            table, where = lines[start:number], f"the table at line {start}"
            assert not lines[start - 1].strip(), f"{where} needs a blank line before it"
            assert len(table) > 2 and re.fullmatch(r"\|(\s*:?-{3,}:?\s*\|)+", table[1]), f"{where} has no separator"
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
            assert len(cells) == 1 and all(row.endswith("|") for row in table), f"{where}: rows of {cells} bars"
            start = None


@every_page
def test_examples_in_python_are_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(block)
