"""pyproject.toml against requirements.txt, constraints.txt and the rooms."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def listed(text: str) -> list[str]:
    """Requirements of a file, without comments."""
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.partition("#")[0].strip()]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=]", requirement)[0].lower().replace("-", "_")


def test_requirements_are_the_same_everywhere():
    run, test = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("# tests\n")
    assert sorted(listed(run)) == sorted(PROJECT["project"]["dependencies"])
    extras = {"test": sorted(listed(test))}
    for path in ROOT.glob("requirements-*.txt"):
        extras[path.stem.removeprefix("requirements-")] = sorted(listed(path.read_text(encoding="utf-8")))
    assert extras == {name: sorted(needed) for name, needed in PROJECT["project"]["optional-dependencies"].items()}


def test_constraints_pin_every_requirement():
    pinned = listed((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert all("==" in line for line in pinned)
    required = [line for path in ROOT.glob("requirements*.txt") for line in listed(path.read_text(encoding="utf-8"))]
    assert {name_of(line) for line in required} <= {name_of(line) for line in pinned}


def test_every_room_and_script_is_packaged():
    setuptools = PROJECT["tool"]["setuptools"]
    rooms = {room for room in MAY_IMPORT if (ROOT / room).is_dir()}
    assert set(setuptools["packages"]) == rooms
    assert set(setuptools["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))
