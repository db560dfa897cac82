"""What `import placer` offers: lazily, and under names that cannot clash with submodules."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import placer
from tests.shared_data import ROOT


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_placer_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'ortools', 'pydantic', 'rich', 'typer', 'ruamel'}"
    assert run(f"import sys, placer; placer.__version__; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_every_exported_name_is_there() -> None:
    for name in placer.__all__:
        assert getattr(placer, name) is not None
    assert set(placer.__all__) <= set(dir(placer))


def test_no_exported_name_is_also_a_submodule() -> None:
    submodules = {path.stem for path in (ROOT / "placer").iterdir()}
    assert "verify" in submodules
    assert submodules & set(placer.__all__) == set()


@pytest.mark.parametrize(
    "first", ["placer.check_placement", "import placer.verify", "placer.solve", "from placer import verify"]
)
def test_verify_is_the_module_whatever_was_used_first(first: str) -> None:
    code = f"import placer; {first}; from placer import verify; print(type(verify).__name__, placer.verify is verify)"
    assert run(code) == "module True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sovle'"):
        placer.sovle  # noqa: B018


def test_the_functions_work_together(tmp_path: Path) -> None:
    problem = placer.load_problem(ROOT / "instances" / "quickstart.yaml", "EP2_TP2_DP4_PP1")
    result, placement = placer.solve(problem, time_limit=20, workers=1)
    assert placement is not None
    assert result.status in ("optimal", "feasible")
    assert placer.check_placement(placement, problem) == []
    placer.save_placement(placement, tmp_path / "placement.json")
    assert placer.load_placement(tmp_path / "placement.json") == placement
    assert [path.name for path in placer.emit(placement, "ranks", tmp_path / "launch")]


def test_solve_is_documented_where_it_lives() -> None:
    assert inspect.getdoc(placer.solve)
    assert placer.solve.__module__ == "placer.solver.answer"
