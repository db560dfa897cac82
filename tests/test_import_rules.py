"""The order of the rooms: what pyproject.toml says about imports holds.

With import-linter its own contracts are run, chains of imports included. Without it, as where only pytest is
installed, the same contracts are checked here for direct imports.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared_data import ROOT

SETTINGS = (ROOT / "pyproject.toml").read_text()
CONTRACTS = tomllib.loads(SETTINGS)["tool"]["importlinter"]["contracts"]
LAYERS = next(contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
FORBIDDEN = next(contract for contract in CONTRACTS if contract["type"] == "forbidden")


def rank_of_rooms() -> dict[str, int]:
    """Return every room with its place in the list, the lowest room highest."""
    return {
        room.strip().strip("()"): place for place, rooms in enumerate(LAYERS) for room in rooms.split("|")
    }


def room_of(module: str) -> str | None:
    """Return the room a module is in; None for `placer` itself and what is outside it."""
    name = ".".join(module.split(".")[:2])
    return name if name in rank_of_rooms() else None


def imports(source: str) -> Iterator[str]:
    """Yield every module that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken(module: str, source: str) -> list[str]:
    """Return what a module's source imports against the rules."""
    rank, room = rank_of_rooms(), room_of(module)
    if room is None:
        return []
    found = []
    for target in imports(source):
        other = room_of(target)
        if other is not None and other != room and rank[other] <= rank[room]:
            found.append(f"{module} imports {target}")
        if room in FORBIDDEN["source_modules"] and target.split(".")[0] in FORBIDDEN["forbidden_modules"]:
            found.append(f"{module} imports {target}")
    return found


def test_no_module_imports_from_a_room_above_or_beside_it() -> None:
    modules = sorted((ROOT / "placer").rglob("*.py"))
    assert len(modules) > 20
    found = []
    for path in modules:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += broken(module, path.read_text())
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("placer.cost.memory", "from placer.verify import Finding"),
        ("placer.report.terminal", "def late():\n    import placer.launchers.registry"),
        ("placer.verify", "from placer import solver"),
        ("placer.spec.units", "from ortools.sat.python import cp_model"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert len(broken(module, source)) >= 1


def test_the_check_lets_an_import_from_below_pass() -> None:
    assert broken("placer.solver.search", "from placer import verify\nfrom ortools.sat import x") == []


def test_every_room_stands_in_the_list() -> None:
    rooms = {
        f"placer.{path.stem}"
        for path in (ROOT / "placer").iterdir()
        if (path.is_dir() and path.name != "__pycache__") or (path.suffix == ".py" and "__" not in path.name)
    }
    assert rooms <= set(rank_of_rooms())


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed")
def test_import_linter_keeps_its_contracts(tmp_path: Path) -> None:
    text = SETTINGS
    for room in rank_of_rooms():
        path = ROOT.joinpath(*room.split("."))
        if not path.is_dir() and not path.with_suffix(".py").exists():
            # A room that is not built yet breaks no rule; in brackets import-linter lets it be missing.
            text = re.sub(rf"\(?{re.escape(room)}\b\)?", f"({room})", text)
    settings = tmp_path / "pyproject.toml"
    settings.write_text(text)
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(settings), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
