"""docs/latency-model.md says what the table of constants says, and its example runs."""

from __future__ import annotations

import re

import pytest

from placer.cost.constants import ABOUT, Constants, known_terms, table
from placer.cost.latency import TERMS
from placer.spec.cluster import load_cluster
from placer.spec.gpu_types import GPU_CATALOGUE
from placer.spec.reading import read_document
from tests.shared_data import ROOT

TEXT = (ROOT / "docs" / "latency-model.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `([^`]+)`\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def table_of(gpu: str) -> list[str]:
    """Return the lines that the document must have for a GPU type."""
    lines = []
    for term, row in table()[gpu].items():
        values = ", ".join(f"{name} {value:g}" for name, value in row.items() if name not in ABOUT)
        shown = (f"{row[name]:.1%}".replace("%", " %") if name in row else "-" for name in ABOUT[:2])
        lines.append(f"| `{term}` | {values} | {' | '.join(shown)} | {row['source']} |")
    return lines


@pytest.mark.parametrize("gpu", [name for name in table() if name not in ("sources", "base")])
def test_every_constant_stands_in_the_document(gpu: str) -> None:
    """The table of a GPU type has every term of constants.toml, with its figures, and no other."""
    found = [line for line in SECTIONS[gpu].splitlines() if line.startswith("| `")]
    assert found == table_of(gpu)


def test_every_source_stands_in_the_document() -> None:
    """Sources are listed as they stand in constants.toml."""
    listed = dict(re.findall(r"^- \*\*(\w+)\*\*: (.+)$", TEXT, re.MULTILINE))
    assert listed == table()["sources"]


def test_every_lender_stands_in_the_document() -> None:
    """The list of who borrows from whom is the table's."""
    listed = dict(re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \|$", TEXT, re.MULTILINE))
    assert listed == table()["base"]


def test_every_term_of_a_step_is_explained() -> None:
    """Each term of a placement's latency has its line, and the document names no term that is not there."""
    explained = re.findall(r"^\| \*\*(\w+)\*\* \|", TEXT, re.MULTILINE)
    assert sorted(explained) == sorted(TERMS)


def test_terms_named_in_passing_exist() -> None:
    """What looks like a constant's term in running text is one, a GPU type is built in."""
    terms = set(known_terms())
    families = {term.split(".")[0] for term in terms}
    for name in re.findall(r"`([a-z_]+\.[a-z0-9_]+)`", TEXT):
        if name.split(".")[0] in families:
            assert name in terms, name
    for name in re.findall(r"`([a-z0-9]+-\d+g)`", TEXT):
        assert name in GPU_CATALOGUE, name


def test_the_example_is_a_cluster(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The cluster file of the document loads, and its constants hold where they are stated."""
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "cluster.yaml"
    path.write_text(example, encoding="utf-8")
    cluster = load_cluster(read_document(path))
    constants = Constants(cluster.types[0])
    reduce = constants.get("all_reduce.8")
    assert (reduce.values["bandwidth_GBps"], reduce.values["start_us"]) == (341.0, 17.5)
    assert reduce.source == "nccl-tests on our rack, 2026-03"
    assert constants.get("gemm.bf16").values["flops"] == 0.74
    assert constants.get("gemm.fp8").source == table()["sources"]["aic"]
