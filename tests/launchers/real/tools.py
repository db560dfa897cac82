"""Where the launchers that the tests run are: in a folder made by `install.sh`, and on the machine.

The folder is `.launchers` beside the project's own files, or what PLACER_LAUNCHERS names. A test whose launcher is not
there is skipped and says so, or fails where PLACER_LAUNCHERS_REQUIRED is set, as it is where everything was installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from tests.shared_data import ROOT

FOLDER = Path(os.environ.get("PLACER_LAUNCHERS", ROOT / ".launchers"))


def missing(what: str) -> NoReturn:
    """Skip the test that needs `what`; fail it where all launchers are to be there."""
    reason = f"{what} is not here; tests/launchers/real/install.sh installs it"
    if os.environ.get("PLACER_LAUNCHERS_REQUIRED"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def installed(path: str) -> Path:
    """Return a file of the folder, such as `openmpi5/bin/mpirun`."""
    found = FOLDER / path
    return found if found.exists() else missing(str(path))


def program(name: str) -> Path:
    """Return a program of the machine, such as `mpirun.openmpi`."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    return Path(found) if found else missing(f"`{name}`")


def python(*modules: str) -> Path:
    """Return the interpreter that has torch, Ray, JAX and the other packages, with every module named."""
    found = installed("python/bin/python")
    asked = (
        "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))"
    )
    if subprocess.run([found, "-c", asked, *modules], check=False, capture_output=True).returncode:
        missing(" or ".join(f"the Python package {module}" for module in modules))
    return found
