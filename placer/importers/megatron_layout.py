"""Megatron's pipeline layout string, such as `Et*3|(tt|)*29,m|L`: which layers are on which pipeline stage.

`E` is the embedding, `t` a decoder layer, `m` a layer of multi-token prediction, `L` the loss (the head). `|` ends a
stage, `x*n` and `(...)*n` repeat, commas mean nothing, a stage may be empty. With virtual stages the string has
PP x VPP stages: stage k is chunk k // PP of pipeline rank k % PP (Megatron-Core, `pipeline_parallel_layer_layout.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from placer.errors import InputError

#: What one string may unfold to. The longest pipelines have a few hundred layers and stages.
MAX_LAYERS = 10_000
MAX_TEXT = 20_000

_ITEM = re.compile(r"(?:\((?P<group>[^()]*)\)|(?P<sign>[EtmL|]))(?P<times>\*(?P<count>[0-9]*))?")
_PLAIN = re.compile(r"[EtmL|()*,0-9]+")


@dataclass(frozen=True)
class PipelineLayout:
    """The stages of a layout in pipeline order, each the signs of its layers: `("Ettt", "tt", "L")`."""

    text: str
    stages: tuple[str, ...]

    @property
    def layers(self) -> int:
        """How many decoder layers all stages hold."""
        return sum(stage.count("t") for stage in self.stages)

    @property
    def mtp_layers(self) -> int:
        """How many layers of multi-token prediction all stages hold."""
        return sum(stage.count("m") for stage in self.stages)

    def bounds(self) -> list[tuple[int, int]]:
        """Return the decoder layers of every stage, half open, in pipeline order."""
        result: list[tuple[int, int]] = []
        first = 0
        for stage in self.stages:
            result.append((first, first + stage.count("t")))
            first = result[-1][1]
        return result

    def faults(self, layers: int, vpp: int = 1) -> list[str]:
        """Return what Megatron would refuse for a model of `layers` decoder layers, a sentence each.

        `vpp` is the virtual stages of each pipeline rank.
        """
        order = "".join(self.stages)
        found: list[str] = []
        if order.count("E") != 1:
            found.append(f"has {order.count('E')} embeddings `E`, expected one")
        elif not order.startswith("E"):
            found.append(f"has the embedding `E` in {self._place('E')}, expected it before everything else")
        # With a loss split over the MTP layers each has an `L` of its own; the last is the model's.
        if order.count("L") not in (1, 1 + order.count("m")):
            found.append(f"has {order.count('L')} losses `L`, expected one")
        elif not order.endswith("L"):
            found.append(f"has the loss `L` in {self._place('L')}, expected it after everything else")
        if self.layers != layers:
            found.append(f"holds {self.layers} decoder layers, but the model has {layers}")
        if "m" in order and "t" in order[order.index("m") :]:
            found.append(f"has a decoder layer `t` after the MTP layer `m` in {self._place('m')}")
        per_chunk = max(1, len(self.stages) // vpp)
        early = [n for n, stage in enumerate(self.stages) if "m" in stage and n // per_chunk < vpp - 1]
        if early:
            found.append(
                f"has the MTP layer `m` in stage {early[0]}, expected it in the last chunk of its rank"
            )
        return found

    def _place(self, sign: str) -> str:
        number = next(number for number, stage in enumerate(self.stages) if sign in stage)
        return f"stage {number} of {len(self.stages)}"


def looks_like_layout(text: str) -> bool:
    """Whether a text is one layout string rather than anything else: signs of layouts only, and `|` or `E...L`."""
    text = text.strip()
    if len(text) > MAX_TEXT or not _PLAIN.fullmatch(text):
        return False
    return "|" in text or (text.startswith("E") and text.endswith("L"))


def parse_layout(text: str, *, file: str | None = None, key: str | None = None) -> PipelineLayout:
    """Return the layout that a string states.

    Raises InputError, with the place in the string, for signs and brackets Megatron has no meaning for, and for what
    unfolds to more than 10,000 layers and stages. Whether the layout fits a model is told by `faults`.
    """
    text = text.strip()
    if not text:
        raise InputError(
            "is an empty pipeline layout, expected one such as `Et*3|(tt|)*29,m|L`", file=file, key=key
        )
    if len(text) > MAX_TEXT:
        raise InputError(
            f"is a pipeline layout of {len(text)} characters, expected at most {MAX_TEXT}", file=file, key=key
        )
    try:
        # Commas go first, as Megatron does it: `t,*3` is `t*3`. Signs are then counted without them.
        unfolded = _unfold(text.replace(",", ""))
    except ValueError as error:
        raise InputError(f"the pipeline layout {_shown(text)} {error}", file=file, key=key) from None
    return PipelineLayout(text, tuple(unfolded.split("|")))


def _unfold(text: str, start: int = 0, *, inside: bool = False) -> str:
    """Return the signs without repetitions; ValueError says in words what is wrong and where, counted from `start`."""
    parts: list[str] = []
    length = position = 0
    while position < len(text):
        item = _ITEM.match(text, position)
        if item is None:
            raise ValueError(_wrong_sign(text, position, start))
        group, count = item.group("group"), item.group("count")
        if item.group("times") and not count:
            raise ValueError(f"has a `*` without a number after it at sign {start + item.end()}")
        if group is not None and (inside or not group or count is None):
            raise ValueError(
                f"has brackets at sign {start + position + 1}, expected `(...)*n` with signs inside, not nested"
            )
        # Read by length first: a number of a thousand digits is not turned into one.
        if count and len(count.lstrip("0")) > len(str(MAX_LAYERS)):
            raise ValueError(f"repeats {_shown(item.group()[:12])} more than {MAX_LAYERS} times")
        unit = (
            item.group("sign") if group is None else _unfold(group, start + item.start("group"), inside=True)
        )
        times = 1 if count is None else int(count)
        length += len(unit) * times
        if length > MAX_LAYERS:
            raise ValueError(f"unfolds to more than {MAX_LAYERS} layers and stages")
        parts.append(unit * times)
        position = item.end()
    return "".join(parts)


def _wrong_sign(text: str, position: int, start: int) -> str:
    sign, at = text[position], start + position + 1
    if sign == "(":
        # No item begins here, so the bracket is not closed before the next one or the end.
        nested = "(" in text[position + 1 :].split(")")[0]
        what = "brackets inside brackets" if nested else "a bracket that is not closed"
        return f"has {what} at sign {at}, which Megatron does not read"
    if sign == ")":
        return f"closes a bracket at sign {at} that none opens"
    if sign == "*" or sign.isdigit():
        return f"has {_shown(sign)} at sign {at}, expected a sign or `(...)` before it to repeat"
    return f"has {_shown(sign)} at sign {at}, expected `E`, `t`, `m`, `L`, `|`, `(...)*n`, `x*n` or a comma"


def _shown(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return repr(short)
