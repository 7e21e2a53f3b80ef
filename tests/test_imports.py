"""The direction of imports: every arrow between files points one way, and none is missing from the plan."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Rooms and the rooms they may import from. Entry points (scripts, `__main__.py`) may use everything below reports.
MAY_IMPORT = {
    "configs": set(),
    "transform": set(),
    "utils": set(),
    "checkpoints": {"configs", "transform", "utils"},
    "data": {"checkpoints", "configs", "transform", "utils"},  # of checkpoints, the downloader
    "models": {"checkpoints", "configs", "transform", "utils"},
    "retrieval": {"models", "data", "checkpoints", "configs", "transform", "utils"},
    "training": {"retrieval", "models", "data", "checkpoints", "configs", "transform", "utils"},
    "reports": {"training", "retrieval", "models", "data", "checkpoints", "configs", "transform", "utils"},
}
SHARE = 0.25  # of the product's lines that one room may hold


def product_files() -> list[Path]:
    """Every Python file of the program; benchmarks and tests look at it from outside."""
    files = [*ROOT.glob("*.py")]
    for room in MAY_IMPORT:
        files += (ROOT / room).rglob("*.py")
    return sorted(files)


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def is_entry(path: Path) -> bool:
    return path.name == "__main__.py" or (path.parent == ROOT and path.stem != "utils")


def imported_files(path: Path) -> set[Path]:
    """Files of this repository that `path` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    candidates = (ROOT / f"{name.replace('.', '/')}.py" for name in names)
    packages = (ROOT / name.replace(".", "/") / "__init__.py" for name in names)
    return {file for file in (*candidates, *packages) if file.exists()}


def test_imports_point_one_way():
    wrong, checked = [], 0
    for path in product_files():
        for target in imported_files(path):
            room, other = room_of(path), room_of(target)
            assert other in MAY_IMPORT, f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}: not a room"
            checked += 1
            if room != other and not is_entry(path) and other not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)} -> {target.relative_to(ROOT)}")
    assert not wrong, "arrows that point the wrong way: " + ", ".join(sorted(wrong))
    assert checked > 100


def test_no_circle_between_files():
    # A package's __init__.py imports lazily for its users' convenience: `from models import load`.
    arrows = {path: imported_files(path) for path in product_files() if path.name != "__init__.py"}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        raise AssertionError("a circle: " + " <- ".join(str(p.relative_to(ROOT)) for p in error.args[1])) from None


def test_no_room_is_crowded():
    lines: dict[str, int] = {}
    for path in product_files():
        lines[room_of(path)] = lines.get(room_of(path), 0) + len(path.read_text(encoding="utf-8").splitlines())
    crowded = {room: count for room, count in lines.items() if count > SHARE * sum(lines.values())}
    assert not crowded, f"of {sum(lines.values())} lines: {crowded}"
