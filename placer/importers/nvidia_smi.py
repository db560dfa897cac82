"""The output of `nvidia-smi topo -m` -> a cluster file.

The matrix shows one host: which GPUs NVLink joins, and how far each NIC is from each GPU. It shows no speed, no
switch and no other host, so every bandwidth and latency in the cluster file is an assumption, and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError, nearest
from placer.spec.cluster import MAX_GPUS_PER_HOST
from placer.spec.gpu_types import GPU_CATALOGUE
from placer.spec.names import check_device, check_name, expand_hosts
from placer.spec.reading import read_text
from placer.spec.units import parse_bandwidth, parse_time

MAX_TEXT_BYTES = 2**20
MAX_NICS = 128

#: How far apart two devices are, nearest first. `SOC` and `PSB` are what older drivers say for `SYS` and `PIX`.
DISTANCE = {"X": 0, "PIX": 1, "PSB": 1, "PXB": 2, "PHB": 3, "NODE": 4, "SYS": 5, "SOC": 5}

_LINK = re.compile(r"X|NV[0-9]{1,3}|PIX|PSB|PXB|PHB|NODE|SYS|SOC")
_RUN_TOGETHER = re.compile(rf"(?:{_LINK.pattern}){{2,}}")
_COLUMNS_RUN_TOGETHER = re.compile(
    r"(?:(?:GPU|NIC)[0-9]+){2,}|(?:mlx5_[0-9]+){2,}|GPU[0-9]+\D.*|NIC[0-9]+\D.*"
)
_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
_GPU = re.compile(r"GPU[0-9]{1,4}")
_NIC = re.compile(r"NIC[0-9]{1,4}")
_AFFINITY = re.compile(r"GPU[ \t]+NUMA[ \t]+ID|CPU[ \t]+Affinity|NUMA[ \t]+Affinity")
_NUMBERS = re.compile(r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*")
_PEER_WORDS = {"OK", "CNS", "GNS", "TNS", "NS", "DR", "U"}
_EXPECTED = "the output of `nvidia-smi topo -m`"

_OTHER_INPUTS = (
    (re.compile(r"<nvidia_smi_log\b"), "the XML of `nvidia-smi -q -x`"),
    (re.compile(r"<system\s+version="), "an NCCL topology file (XML)"),
    (re.compile(r"<graphs\s+version="), "an NCCL graph file (XML)"),
    (re.compile(r"<topology\b"), "an hwloc topology (XML)"),
    (
        re.compile(r"ROCm System Management Interface|Weight between two GPUs|\(Topology\)"),
        "the output of `rocm-smi --showtopo`",
    ),
    (re.compile(r"^\s*(?:SwitchName|BlockName)=", re.MULTILINE | re.IGNORECASE), "a Slurm `topology.conf`"),
    (re.compile(r"Failed to run topology matrix"), "the message that `nvidia-smi topo -m` failed"),
)


@dataclass(frozen=True)
class NvidiaTopology:
    """What `nvidia-smi topo -m` shows of one host.

    `gpus` holds the column names, such as `GPU0`. `links` is (gpus, gpus) words such as `X`, `NV18`, `PIX`, `SYS`.
    `nic_columns` holds the column names of the NICs, `nics` their device names, None where the legend is cut.
    `nic_links` is (gpus, nics) words; `nic_peers` (nics, nics) words, empty where the NIC rows are missing.
    `cpus` and `numa` are one entry per GPU as printed (`0-47,96-143`; `0` or `0,3-9`), None where blank.
    """

    gpus: tuple[str, ...]
    links: tuple[tuple[str, ...], ...]
    nic_columns: tuple[str, ...]
    nics: tuple[str | None, ...]
    nic_links: tuple[tuple[str, ...], ...]
    nic_peers: tuple[tuple[str, ...], ...]
    cpus: tuple[str | None, ...]
    numa: tuple[str | None, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """The GPU indices, as in the column names."""
        return tuple(int(name[3:]) for name in self.gpus)

    def joined(self, first: int, second: int) -> bool:
        """Return whether NVLink joins two GPUs, by their place in `gpus`."""
        return self.links[first][second].startswith("NV")

    def distance(self, first: int, second: int) -> int:
        """Return how far two GPUs are apart over PCIe: 1 (PIX) to 5 (SYS); 0 for NVLink and for itself."""
        return DISTANCE.get(self.links[first][second], 0)


@dataclass(frozen=True)
class ImportedCluster:
    """The text of a cluster file, and what a person must know before trusting it."""

    text: str
    notes: list[str]


def import_cluster(
    path: str | Path,
    *,
    hosts: str,
    gpu_type: str,
    name: str | None = None,
    nvlink_hosts: int = 1,
    nic_bandwidth: str = "400 Gb/s",
    nic_latency: str = "13 us",
    nvlink_latency: str = "3 us",
    pcie_bandwidth: str | None = None,
    pcie_latency: str = "8 us",
) -> ImportedCluster:
    """Return the cluster file for `hosts`, all alike, from one of them's `nvidia-smi topo -m` at `path`.

    Raises InputError when the file cannot be read, is something else, or is damaged, or a value cannot be used.
    """
    topology = parse_topology(read_text(path, MAX_TEXT_BYTES), file=str(path))
    return cluster_yaml(
        topology,
        hosts=hosts,
        gpu_type=gpu_type,
        name=name,
        nvlink_hosts=nvlink_hosts,
        nic_bandwidth=nic_bandwidth,
        nic_latency=nic_latency,
        nvlink_latency=nvlink_latency,
        pcie_bandwidth=pcie_bandwidth,
        pcie_latency=pcie_latency,
    )


def parse_topology(text: str, file: str | None = None) -> NvidiaTopology:
    """Return what the text of `nvidia-smi topo -m` shows; TAB separated or padded with spaces.

    Raises InputError, with the line, when no GPU column is found, a row is missing, cut or run together, a word is
    unknown, or the matrix is not symmetric.
    """
    return _Parser(text, file).parse()


@dataclass(frozen=True)
class _Column:
    name: str
    start: int


class _Parser:
    """Reads the header, then one row per device, then the NIC legend."""

    def __init__(self, text: str, file: str | None) -> None:
        # Headers are underlined on a terminal; a paste may have lost the escape character and kept the rest.
        plain = re.sub(r"\x1b?\[[0-9;]*m|\x1b\[[0-9;?]*[A-Za-z]", "", text)
        self.lines = plain.replace("\xa0", " ").split("\n")
        self.lines = [line.rstrip("\r") for line in self.lines]
        self.file = file

    def error(self, message: str, line: int | None = None) -> InputError:
        """Return the error for a line, counted from 0."""
        return InputError(message, file=self.file, line=None if line is None else line + 1)

    def parse(self) -> NvidiaTopology:
        text = "\n".join(self.lines)
        if not text.strip():
            raise self.error(f"is empty, expected {_EXPECTED}")
        for pattern, what in _OTHER_INPUTS:
            if pattern.search(text):
                raise self.error(f"is {what}, which is not read here; expected {_EXPECTED}")
        if any(not char.isprintable() and char not in "\n\t\r\f" for char in text):
            raise self.error(f"holds control characters, expected {_EXPECTED}")
        header = self._find_header()
        devices, affinity = self._columns(header)
        gpus = [name for name in devices if _GPU.fullmatch(name)]
        nics = devices[len(gpus) :]
        rows, affinities, line_of = self._rows(header, devices, affinity)
        self._check_matrix(devices, rows, line_of)
        names = self._nic_names(header, nics)
        count = len(gpus)
        return NvidiaTopology(
            gpus=tuple(gpus),
            links=tuple(rows[gpu][:count] for gpu in gpus),
            nic_columns=tuple(nics),
            nics=tuple(names.get(nic) for nic in nics),
            nic_links=tuple(rows[gpu][count:] for gpu in gpus),
            nic_peers=tuple(rows[nic][count:] for nic in nics) if all(nic in rows for nic in nics) else (),
            cpus=tuple(self._affinity(affinities[gpu], "CPU Affinity", line_of[gpu]) for gpu in gpus),
            numa=tuple(self._affinity(affinities[gpu], "NUMA Affinity", line_of[gpu]) for gpu in gpus),
        )

    def _find_header(self) -> int:
        headers = []
        for number, line in enumerate(self.lines):
            words = line.split()
            if not words or not re.match(r"GPU[0-9]+(\b|[A-Z])", words[0]):
                continue
            is_row = len(words) > 1 and (
                _LINK.fullmatch(words[1]) or _RUN_TOGETHER.fullmatch(words[1]) or words[1] in _PEER_WORDS
            )
            if not is_row and (_AFFINITY.search(line) or all(_DEVICE.fullmatch(word) for word in words)):
                headers.append(number)
        if not headers:
            row = next(
                (n for n, line in enumerate(self.lines) if re.match(r"\s*GPU[0-9]+\s+X\b", line)), None
            )
            if row is not None:
                raise self.error(
                    "has rows but no header line with the columns GPU0, GPU1, ... above them", row
                )
            raise self.error(f"has no GPU columns, expected {_EXPECTED}")
        if len(headers) > 1:
            raise self.error(
                f"begins a second matrix (the first is on line {headers[0] + 1}); keep one, for hosts that are alike",
                headers[1],
            )
        return headers[0]

    def _columns(self, header: int) -> tuple[list[str], list[_Column]]:
        line = self.lines[header].expandtabs(8)
        affinity = [_Column(" ".join(m.group().split()), m.start()) for m in _AFFINITY.finditer(line)]
        end = affinity[0].start if affinity else len(line)
        words = line[:end].split()
        if affinity and end > 0 and line[end - 1] != " ":
            raise self.error(f"has columns that run together: `{words[-1]}{affinity[0].name}`", header)
        for word in words:
            if _COLUMNS_RUN_TOGETHER.fullmatch(word):
                raise self.error(
                    f"has columns that run together: `{word[:40]}`; copy the output from a wider terminal or a file",
                    header,
                )
            if not _DEVICE.fullmatch(word):
                raise self.error(
                    f"found `{word[:40]}` in the header, expected the name of a GPU or a NIC", header
                )
        for first, second in pairwise(words):
            if not _GPU.fullmatch(first) and _GPU.fullmatch(second):
                raise self.error(
                    f"has the column `{second}` after the NIC `{first}`, expected GPUs first", header
                )
        if len(set(words)) != len(words):
            twice = next(first for first, second in pairwise(sorted(words)) if first == second)
            raise self.error(f"has the column `{twice}` twice", header)
        count = sum(_GPU.fullmatch(word) is not None for word in words)
        if count > MAX_GPUS_PER_HOST or len(words) - count > MAX_NICS:
            raise self.error(
                f"has {count} GPUs and {len(words) - count} NICs, expected at most {MAX_GPUS_PER_HOST} and {MAX_NICS}",
                header,
            )
        return words, affinity

    def _rows(
        self, header: int, devices: list[str], affinity: list[_Column]
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]], dict[str, int]]:
        gpus = [name for name in devices if _GPU.fullmatch(name)]
        rows: dict[str, tuple[str, ...]] = {}
        affinities: dict[str, dict[str, str]] = {}
        line_of: dict[str, int] = {}
        for number in range(header + 1, len(self.lines)):
            words = self.lines[number].split()
            if not words:
                continue
            name = words[0]
            if name not in devices:
                if _GPU.fullmatch(name) or (_NIC.fullmatch(name) and len(words) > 1):
                    raise self.error(f"has a row for `{name}`, which is not among the columns", number)
                if all(gpu in rows for gpu in gpus):
                    break
                if name.startswith("Legend"):
                    break
                raise self.error(
                    f"found `{' '.join(words)[:40]}`, expected the row of {self._missing(gpus, rows)}; "
                    "a line that the terminal wrapped must be joined again",
                    number,
                )
            if name in rows:
                raise self.error(f"has a second row for `{name}`", number)
            rows[name], affinities[name] = self._row(number, devices, affinity)
            line_of[name] = number
        missing = self._missing(gpus, rows)
        if missing:
            raise self.error(f"the matrix is not square: the row of {missing} is missing", header)
        nics = devices[len(gpus) :]
        absent = self._missing(nics, rows)
        if absent and any(nic in rows for nic in nics):
            raise self.error(
                f"the matrix is not square: the row of {absent} is missing, others are there", header
            )
        return rows, affinities, line_of

    @staticmethod
    def _missing(names: Sequence[str], rows: dict[str, tuple[str, ...]]) -> str:
        return next((name for name in names if name not in rows), "")

    def _row(
        self, number: int, devices: list[str], affinity: list[_Column]
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        line = self.lines[number]
        words = line.split()
        name, count = words[0], len(devices)
        links = words[1 : count + 1]
        for position, word in enumerate(links):
            if _LINK.fullmatch(word):
                continue
            if _RUN_TOGETHER.fullmatch(word):
                raise self.error(
                    f"has columns that run together in the row of `{name}`: `{word[:40]}`; copy the output from a wider "
                    "terminal or a file",
                    number,
                )
            if word in _PEER_WORDS:
                raise self.error(
                    f"`{word}` is a word of `nvidia-smi topo -p2p`, expected {_EXPECTED}", number
                )
            if word == "N/A" or word[0].isdigit():
                links = links[:position]
                break
            raise self.error(
                f"found `{word[:40]}` between `{name}` and `{devices[position]}`, expected a link such as `NV18`, `PIX` "
                "or `SYS`",
                number,
            )
        if len(links) < count:
            raise self.error(f"the row of `{name}` is cut: it has {len(links)} of {count} links", number)
        return tuple(links), self._affinity_cells(number, name, count, affinity)

    def _affinity_cells(self, number: int, name: str, count: int, affinity: list[_Column]) -> dict[str, str]:
        """Return what stands under each affinity column; a blank cell gives no entry."""
        if not _GPU.fullmatch(name):
            return {}
        line = self.lines[number]
        cells = [cell.strip() for cell in line.strip(" ").split("\t")]
        names = [column.name for column in affinity]
        rest = cells[count + 1 :]
        if len(cells) > count and all(_LINK.fullmatch(cell) for cell in cells[1 : count + 1]):
            # The driver prints one TAB more after a short cell than the header has: an empty cell too many.
            found = _drop_blanks(names, rest)
            if len(found) != sum(map(bool, rest)):
                raise self.error(f"the row of `{name}` has more cells than there are columns", number)
            return dict(found)
        expanded = line.expandtabs(8)
        tokens = [(match.start(), match.group()) for match in re.finditer(r"\S+", expanded)][count + 1 :]
        if len(tokens) > len(affinity):
            raise self.error(
                f"the row of `{name}` has {len(tokens) - len(affinity)} cells too many: `{tokens[-1][1][:40]}`",
                number,
            )
        # Fewer words than columns: a cell is blank, and where the others stand tells which. The driver's TABs
        # became spaces up to the next multiple of 8, so a wider gap is a blank cell.
        indent = len(expanded) - len(expanded.lstrip())
        if len(tokens) < len(affinity) and tokens and all((start - indent) % 8 == 0 for start, _ in tokens):
            last_link = [match.end() for match in re.finditer(r"\S+", expanded)][count]
            return dict(_drop_blanks(names, _unfold(tokens, last_link - indent, indent)))
        chosen = min(
            combinations(affinity, len(tokens)),
            key=lambda columns: sum(
                abs(column.start - start) for column, (start, _) in zip(columns, tokens, strict=True)
            ),
        )
        return {column.name: word for column, (_, word) in zip(chosen, tokens, strict=True)}

    def _affinity(self, cells: dict[str, str], column: str, number: int) -> str | None:
        value = cells.get(column)
        if value is None or value == "N/A":
            return None
        if not _NUMBERS.fullmatch(value):
            raise self.error(
                f"found `{value[:40]}` under `{column}`, expected numbers such as `0-47,96-143`", number
            )
        return value

    def _check_matrix(
        self, devices: list[str], rows: dict[str, tuple[str, ...]], line_of: dict[str, int]
    ) -> None:
        for place, name in enumerate(devices):
            if name not in rows:
                continue
            for other_place, other in enumerate(devices):
                word = rows[name][other_place]
                if (word == "X") != (place == other_place):
                    expected = "`X`" if place == other_place else "a link"
                    raise self.error(
                        f"found `{word}` between `{name}` and `{other}`, expected {expected}", line_of[name]
                    )
                if other in rows and other_place < place and rows[other][place] != word:
                    raise self.error(
                        f"the matrix is not symmetric: `{name}` to `{other}` is `{word}`, and back `{rows[other][place]}`",
                        line_of[name],
                    )

    def _nic_names(self, header: int, nics: list[str]) -> dict[str, str]:
        """Return the device name by column: from the legend, or the column itself in older drivers."""
        names = {nic: nic for nic in nics if not _NIC.fullmatch(nic)}
        for number in range(header + 1, len(self.lines)):
            match = re.fullmatch(r"\s*(NIC[0-9]{1,4})\s*:\s*(\S*)\s*", self.lines[number])
            if match is None or match.group(1) not in nics or not match.group(2):
                continue
            nic, device = match.groups()
            try:
                check_device(device)
            except ValueError as error:
                raise self.error(str(error), number) from None
            if nic in names or device in names.values():
                raise self.error(f"the NIC legend names `{nic}` or `{device}` a second time", number)
            names[nic] = device
        return names


def _drop_blanks(names: list[str], cells: list[str]) -> list[tuple[str, str]]:
    """Return (column, cell) of the cells that hold something; blanks after the first cell go where there are too many."""
    kept = list(cells)
    while len(kept) > len(names) and "" in kept[1:]:
        del kept[1 + kept[1:].index("")]
    return [(column, cell) for column, cell in zip(names, kept, strict=False) if cell]


def _unfold(tokens: list[tuple[int, str]], end: int, indent: int) -> list[str]:
    """Return words as the cells they were when TABs stood between them, blanks included."""
    cells: list[str] = []
    for start, word in tokens:
        next_stop = (end // 8 + 1) * 8
        cells.extend("" for _ in range((start - indent - next_stop) // 8))
        cells.append(word)
        end = start - indent + len(word)
    return cells


def choose_nics(topology: NvidiaTopology) -> tuple[int, ...]:
    """Return the column of the NIC for each GPU; () where there are no NICs.

    Every GPU gets one of its nearest. Among those, in this order: bonds are avoided (they carry the management
    network), the NICs are used as evenly as can be, and a card with two ports far from every GPU is avoided. What
    is still equal follows the order of the columns.
    """
    gpus, nics = len(topology.gpus), len(topology.nic_columns)
    if not nics:
        return ()
    distance = np.array([[DISTANCE.get(word, 0) for word in row] for row in topology.nic_links])
    bond = np.array(["bond" in (name or "") for name in topology.nics])
    paired = np.array([_is_far_pair(topology, nic, distance) for nic in range(nics)])
    # One column per (NIC, how many GPUs have it already), so that a second GPU on a NIC costs more than a first.
    column_nic = np.repeat(np.arange(nics), gpus)
    before = np.tile(np.arange(gpus), nics)
    order = (np.arange(gpus)[:, None] - np.arange(nics)[None, :]) ** 2
    cost = distance * 10**13 + bond * 10**12 + paired * 2 * 10**6 + order
    chosen = [int(column_nic[slot]) for slot in _assign(cost[:, column_nic] + before * 10**9)]
    return tuple(_spread(chosen, topology.nic_links, cost // 10**6))


def _spread(chosen: list[int], links: Sequence[tuple[str, ...]], cost: NDArray[np.int64]) -> list[int]:
    """Swap NICs between GPUs, at equal cost, until GPUs that stand alike to all NICs share as few as they can."""

    def alike_on_one(gpu: int, nic: int, other: int) -> int:
        return sum(
            chosen[third] == nic and links[third] == links[gpu]
            for third in range(len(chosen))
            if third not in (gpu, other)
        )

    improved = True
    while improved:
        improved = False
        for gpu, other in combinations(range(len(chosen)), 2):
            nic, other_nic = chosen[gpu], chosen[other]
            if cost[gpu, nic] + cost[other, other_nic] != cost[gpu, other_nic] + cost[other, nic]:
                continue
            before = alike_on_one(gpu, nic, other) + alike_on_one(other, other_nic, gpu)
            after = alike_on_one(gpu, other_nic, other) + alike_on_one(other, nic, gpu)
            if nic != other_nic and links[gpu] != links[other] and after < before:
                chosen[gpu], chosen[other], improved = other_nic, nic, True
    return chosen


def _is_far_pair(topology: NvidiaTopology, nic: int, distance: NDArray[np.int64]) -> bool:
    if not topology.nic_peers or distance[:, nic].min() <= DISTANCE["PXB"]:
        return False
    return any(DISTANCE.get(word) == 1 for word in topology.nic_peers[nic])


def _assign(cost: NDArray[np.int64]) -> list[int]:
    """Return the column of each row in an assignment of least total cost; `cost` is (rows, columns >= rows).

    The Hungarian method by shortest augmenting paths. The first of equal columns is taken, so the answer is always the same.
    """
    rows, columns = cost.shape
    row_price = np.zeros(rows + 1, dtype=np.int64)
    column_price = np.zeros(columns + 1, dtype=np.int64)
    row_of = np.zeros(columns + 1, dtype=np.int64)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        least = np.full(columns + 1, np.iinfo(np.int64).max // 2)
        previous = np.zeros(columns + 1, dtype=np.int64)
        used = np.zeros(columns + 1, dtype=bool)
        while True:
            used[column] = True
            reduced = cost[row_of[column] - 1] - row_price[row_of[column]] - column_price[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:][better] = reduced[better]
            previous[1:][better] = column
            step_to = int(np.argmin(np.where(used[1:], np.iinfo(np.int64).max, least[1:]))) + 1
            step = least[step_to]
            row_price[row_of[used]] += step
            column_price[used] -= step
            least[~used] -= step
            column = step_to
            if row_of[column] == 0:
                break
        while column:
            row_of[column] = row_of[previous[column]]
            column = int(previous[column])
    answer = [0] * rows
    for column in range(1, columns + 1):
        if row_of[column]:
            answer[row_of[column] - 1] = column - 1
    return answer


def _partition(
    blocks: Sequence[tuple[int, ...]], joined: Callable[[int, int], bool]
) -> list[tuple[int, ...]]:
    """Merge blocks of GPUs into domains in which every pair of blocks is joined throughout, the largest first."""

    def all_joined(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
        return all(joined(a, b) for a in first for b in second)

    left, domains = list(blocks), []
    while left:
        best: list[tuple[int, ...]] = []
        for seed in left:
            grown = [seed]
            for block in left:
                if block != seed and all(all_joined(block, member) for member in grown):
                    grown.append(block)
            if sum(map(len, grown)) > sum(map(len, best)):
                best = grown
        domains.append(tuple(sorted(gpu for block in best for gpu in block)))
        left = [block for block in left if block not in best]
    return sorted(domains)


def cluster_yaml(
    topology: NvidiaTopology,
    *,
    hosts: str,
    gpu_type: str,
    name: str | None = None,
    nvlink_hosts: int = 1,
    nic_bandwidth: str = "400 Gb/s",
    nic_latency: str = "13 us",
    nvlink_latency: str = "3 us",
    pcie_bandwidth: str | None = None,
    pcie_latency: str = "8 us",
) -> ImportedCluster:
    """Return the cluster file of `hosts`, each like `topology`, with GPUs of the built-in type `gpu_type`.

    `nvlink_hosts` is how many consecutive hosts share one NVLink domain, which the matrix cannot show. NVLink has the
    bandwidth of the built-in type; `nic_bandwidth` is of one NIC; `pcie_bandwidth`, per GPU and direction, is taken
    from the built-in type where it has no NVLink. Between sockets half of it and half as much latency again are
    assumed. Raises InputError when a value cannot be used.
    """
    return _Writer(
        topology,
        _Given(
            hosts,
            gpu_type,
            name,
            nvlink_hosts,
            nic_bandwidth,
            nic_latency,
            nvlink_latency,
            pcie_bandwidth,
            pcie_latency,
        ),
    ).write()


@dataclass(frozen=True)
class _Given:
    hosts: str
    gpu_type: str
    name: str | None
    nvlink_hosts: int
    nic_bandwidth: str
    nic_latency: str
    nvlink_latency: str
    pcie_bandwidth: str | None
    pcie_latency: str


T = TypeVar("T")


def _checked(key: str, check: Callable[[str], T], value: str) -> T:
    try:
        return check(value)
    except ValueError as error:
        raise InputError(str(error), key=key) from None


@dataclass(frozen=True)
class _Level:
    """One level of the file: `domains` are the GPUs of one host by place, None where a domain is whole hosts."""

    name: str
    bandwidth: str
    latency: str
    comment: str
    domains: list[tuple[int, ...]] | None
    hosts: int = 1


#: What a distance is called as a level.
_LEVEL_NAMES = {1: "pix", 2: "pxb", 3: "phb", 4: "numa", 5: "host"}
#: NVLink carries at least this much; a built-in type below it has none.
_LEAST_NVLINK = 100e9


class _Writer:
    """Builds the text of a cluster file, with the assumptions as comments beside the figures."""

    def __init__(self, topology: NvidiaTopology, given: _Given) -> None:
        self.topology, self.given = topology, given
        self.notes: list[str] = []
        self.count = len(topology.gpus)
        self.hosts = _checked("hosts", expand_hosts, given.hosts)
        if given.gpu_type not in GPU_CATALOGUE:
            hint = nearest(given.gpu_type, GPU_CATALOGUE) or f"; known: {', '.join(GPU_CATALOGUE)}"
            raise InputError(f"found `{given.gpu_type[:60]}`, which is not built in{hint}", key="gpu_type")
        self.name = _checked("name", check_name, given.name or f"imported {given.gpu_type}")
        self.type_bandwidth = GPU_CATALOGUE[given.gpu_type].link_bandwidth
        self.nic = self._positive("nic_bandwidth", given.nic_bandwidth)
        self.pcie = self._positive("pcie_bandwidth", given.pcie_bandwidth or self._default_pcie())
        for key in ("nic_latency", "nvlink_latency", "pcie_latency"):
            _checked(key, parse_time, getattr(given, key))
        if not 1 <= given.nvlink_hosts <= len(self.hosts):
            raise InputError(
                f"found {given.nvlink_hosts}, expected 1 to {len(self.hosts)}: how many of these hosts share one NVLink "
                "domain",
                key="nvlink_hosts",
            )
        self.cliques = _partition([(gpu,) for gpu in range(self.count)], topology.joined)
        self.chosen = choose_nics(topology)

    @staticmethod
    def _positive(key: str, value: str) -> float:
        bandwidth = _checked(key, parse_bandwidth, value)
        if bandwidth == 0:
            raise InputError(f"found {value!r}, expected a bandwidth above 0", key=key)
        return bandwidth

    def _default_pcie(self) -> str:
        if self.type_bandwidth < _LEAST_NVLINK:
            return _gigabytes(self.type_bandwidth)
        return "32 GB/s" if self.given.gpu_type.startswith("a100") else "64 GB/s"

    def write(self) -> ImportedCluster:
        """Return the file and the notes."""
        lines = [
            "# Written from `nvidia-smi topo -m` of one host; the other hosts are taken to be like it.",
            "# The matrix shows no speeds: every bandwidth and latency below is an assumption to check.",
            "kind: cluster",
            f"name: {json.dumps(self.name)}",
            'source: "nvidia-smi topo -m of one host; bandwidths and latencies assumed"',
            "hosts:",
            *self._host_lines(),
            "levels:",
        ]
        levels = self._levels()
        for number, level in enumerate(levels):
            lines.extend(self._level_lines(level, holds_host=number == len(levels) - 1))
        lines += [
            f"  # Assumed: {self.given.nic_bandwidth.strip()} for each NIC, and one level of switches for all hosts.",
            "  - name: network",
            f"    bandwidth: {json.dumps(self.given.nic_bandwidth)}",
            f"    latency: {json.dumps(self.given.nic_latency)}",
        ]
        return ImportedCluster("\n".join(lines) + "\n", self.notes)

    def _host_lines(self) -> list[str]:
        topology, indices = self.topology, list(self.topology.indices)
        plain = indices == list(range(self.count))
        lines = [
            f"  - hosts: {json.dumps(self.given.hosts)}",
            f"    gpu_type: {self.given.gpu_type}",
            f"    gpus: {self.count if plain else indices}",
        ]
        numa = [None if value is None else int(re.split("[,-]", value)[0]) for value in topology.numa]
        if None not in numa:
            lines.append(f"    numa: {numa}")
        else:
            self.notes.append("the NUMA node of some GPUs is blank, so none is stated")
        if all(topology.cpus):
            lines.append(f"    cpus: {json.dumps(list(topology.cpus))}")
        elif any(topology.cpus):
            lines.append("    # A blank entry: the CPUs near that GPU were hidden, as they are inside a job.")
            lines.append(f"    cpus: {json.dumps([value or '' for value in topology.cpus])}")
            self.notes.append(
                "the CPUs near some GPUs are blank: the command ran inside a job or a container"
            )
        return [*lines, *self._nic_lines()]

    def _nic_lines(self) -> list[str]:
        topology = self.topology
        if not self.chosen:
            self.notes.append(
                f"no NIC is shown: the network link of {self.given.nic_bandwidth} for each GPU had to be assumed"
            )
            return ["    # The matrix shows no NIC."]
        far = ", ".join(
            f"{name} {topology.nic_links[gpu][nic]}"
            for gpu, (name, nic) in enumerate(zip(topology.gpus, self.chosen, strict=True))
        )
        lines = [f"    # The nearest NIC of each GPU, ties spread: {far}."]
        names = [topology.nics[nic] for nic in self.chosen]
        if None in names:
            columns = [topology.nic_columns[nic] for nic in self.chosen]
            self.notes.append("the NIC legend is cut: the devices have no names, so no `nics` are stated")
            return [
                *lines,
                f"    # Their columns are {', '.join(columns)}; the legend with their names was cut.",
            ]
        shared = self.count - len(set(self.chosen))
        if shared:
            self.notes.append(
                f"{self.count} GPUs share {len(set(self.chosen))} NICs: the host's uplink is bounded by them"
            )
        return [*lines, f"    nics: {json.dumps(names)}"]

    def _levels(self) -> list[_Level]:
        """Return the levels inside a host, or inside the hosts that share NVLink."""
        given, levels = self.given, []
        largest = max(len(clique) for clique in self.cliques)
        if largest > 1:
            levels.append(self._nvlink_level())
        elif given.nvlink_hosts > 1 and self.count > 1:
            raise InputError(
                f"found {given.nvlink_hosts}, but the matrix shows no NVLink within the host",
                key="nvlink_hosts",
            )
        elif given.nvlink_hosts > 1:
            levels.append(
                _Level(
                    "nvlink",
                    _gigabytes(self.type_bandwidth),
                    given.nvlink_latency,
                    "",
                    None,
                    given.nvlink_hosts,
                )
            )
        if largest == 1 and self.count > 1 and self.type_bandwidth >= _LEAST_NVLINK:
            self.notes.append(
                f"no NVLink is shown, and `{given.gpu_type}` has it: either it is down, or this is the output of "
                "`nvidia-smi topo -mp`, which leaves it out"
            )
        if given.gpu_type.startswith("gb200") and given.nvlink_hosts == 1:
            self.notes.append(
                "the NVLink domain of GB200 spans hosts, which the matrix cannot show; it was taken to end at the host: "
                "state how many hosts share one"
            )
        if given.nvlink_hosts == 1:
            levels.extend(self._pcie_levels())
        return levels

    def _nvlink_level(self) -> _Level:
        given, topology = self.given, self.topology
        words = sorted({word for row in topology.links for word in row if word.startswith("NV")})
        comment = (
            f"Assumed: the nominal NVLink bandwidth of {given.gpu_type}; the matrix shows {', '.join(words)}."
        )
        if len(words) > 1:
            self.notes.append(
                f"NVLink joins some pairs with more links than others ({', '.join(words)}): one bandwidth was assumed"
            )
        if self.type_bandwidth < _LEAST_NVLINK:
            self.notes.append(
                f"the matrix shows NVLink, and the built-in `{given.gpu_type}` has none: its PCIe bandwidth was taken"
            )
        alone = [topology.gpus[clique[0]] for clique in self.cliques if len(clique) == 1]
        if alone:
            names = ", ".join(alone)
            comment += f" No NVLink, so standing alone: {names}."
            self.notes.append(
                f"{names} lost NVLink, or never had it: it stands alone on each of the {len(self.hosts)} hosts; "
                "where only some hosts are so, import those apart"
            )
        joined = [clique for clique in self.cliques if len(clique) > 1]
        if len(joined) > 1:
            comment += f" NVLink joins only the GPUs within each of {len(joined)} sets."
            if given.nvlink_hosts > 1:
                raise InputError(
                    f"found {given.nvlink_hosts}, but NVLink does not even join the GPUs of one host",
                    key="nvlink_hosts",
                )
            crossing = any(
                topology.joined(a, b) for one, two in combinations(joined, 2) for a in one for b in two
            )
            if crossing:
                self.notes.append(
                    "NVLink also joins some GPUs of different sets; only sets joined throughout are taken as domains"
                )
        if given.gpu_type.startswith("gb200") and given.nvlink_hosts == 1:
            comment += (
                " On GB200 the domain spans hosts, which the matrix cannot show: `hosts: 18` on an NVL72."
            )
        whole = len(self.cliques) == 1
        return _Level(
            "nvlink",
            _gigabytes(self.type_bandwidth),
            given.nvlink_latency,
            comment,
            None if whole else self.cliques,
            given.nvlink_hosts,
        )

    def _pcie_levels(self) -> list[_Level]:
        levels: list[_Level] = []
        blocks = self.cliques
        near, far = parse_time(self.given.pcie_latency), 1.5 * parse_time(self.given.pcie_latency)
        for distance in range(1, 6):
            if len(blocks) == 1:
                break
            merged = _partition(blocks, lambda a, b: self.topology.distance(a, b) <= distance)  # noqa: B023
            if merged == blocks:
                continue
            blocks, across = merged, distance == DISTANCE["SYS"]
            comment = (
                "Assumed: half the PCIe bandwidth between sockets, which the matrix shows as SYS."
                if across
                else f"Assumed: PCIe; the matrix shows {_word(distance)} at most between these GPUs."
            )
            levels.append(
                _Level(
                    "host" if len(blocks) == 1 else _LEVEL_NAMES[distance],
                    _gigabytes(self.pcie / 2 if across else self.pcie),
                    _microseconds(far if across else near),
                    comment,
                    None if len(blocks) == 1 else blocks,
                )
            )
        if levels:
            self.notes.append(
                "PCIe bandwidths and latencies are assumed: the matrix shows only the kind of path"
            )
        return levels

    def _level_lines(self, level: _Level, holds_host: bool) -> list[str]:
        lines = [
            *([f"  # {level.comment}"] if level.comment else []),
            f"  - name: {level.name}",
            f"    bandwidth: {json.dumps(level.bandwidth)}",
            f"    latency: {json.dumps(level.latency)}",
        ]
        if level.domains is None:
            lines.append(f"    hosts: {level.hosts}")
        elif level.hosts == 1 and (size := self._regular(level.domains)):
            lines.append(f"    gpus: {size}")
        else:
            lines.append("    domains:")
            lines.extend(self._domain_lines(level))
        nics = len(set(self.chosen))
        if holds_host and 0 < nics < self.count:
            lines.append(f"    # {nics} NICs for the {self.count} GPUs of a host.")
            lines.append(f"    uplink: {json.dumps(_gigabytes(nics * self.nic * level.hosts))}")
        return lines

    @staticmethod
    def _regular(domains: list[tuple[int, ...]]) -> int:
        """Return the size of the domains when they are runs of one length, or 0."""
        size = len(domains[0])
        runs = [gpu // size for domain in domains for gpu in domain]
        numbers = [number for number, domain in enumerate(domains) for _ in domain]
        return size if runs == numbers else 0

    def _domain_lines(self, level: _Level) -> list[str]:
        """Return one line per domain of more than one GPU; the others stand alone without being named."""
        lines: list[str] = []
        indices = self.topology.indices
        assert level.domains is not None
        for first in range(0, len(self.hosts), level.hosts):
            group = self.hosts[first : first + level.hosts]
            for domain in level.domains:
                if len(domain) > 1:
                    gpus = {host: [indices[gpu] for gpu in domain] for host in group}
                    lines.append(f"      - {{name: {level.name}{len(lines)}, gpus: {json.dumps(gpus)}}}")
        return lines


def _word(distance: int) -> str:
    return next(word for word, value in DISTANCE.items() if value == distance)


def _gigabytes(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.10g} GB/s"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.10g} us"
