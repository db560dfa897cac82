"""The version of this installation."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("placer")
except PackageNotFoundError:
    __version__ = "0+unknown"
