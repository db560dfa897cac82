"""Where the measurements that some tests compare with lie, and how to skip without them."""

from __future__ import annotations

from pathlib import Path

import pytest

#: The root of this checkout.
ROOT = Path(__file__).resolve().parents[1]

#: Published configurations and measurements, kept beside the checkout and not in it.
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="the shared measurements are not beside this checkout"
)
