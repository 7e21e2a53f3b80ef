"""The direction of imports: train_retrieval -> data, models -> transform, utils, configs."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = {"configs", "data", "models", "transform", "utils"}
MAY_IMPORT = {
    "configs": set(),
    "transform": set(),
    "utils": set(),
    "data": {"transform", "utils", "configs"},
    "models": {"transform", "utils", "configs"},
}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names.add(node.module)
    return {name.split(".")[0] for name in names} & (ROOMS | {"train_retrieval", "tests", "benchmarks"})


def test_imports_point_one_way():
    checked = 0
    for room, allowed in MAY_IMPORT.items():
        files = [ROOT / "utils.py"] if room == "utils" else sorted((ROOT / room).rglob("*.py"))
        for path in files:
            strangers = imported_rooms(path) - allowed - {room}
            assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"
            checked += 1
    assert checked >= 15
