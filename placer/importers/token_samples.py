"""Routing samples from arrays of expert numbers, with everything a sample promises checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.importers.arrays import listed, npz_names, open_archive, read_npz_array
from placer.importers.load_tables import MAX_LAYERS
from placer.spec.routing import RoutingSample

#: Expert numbers are kept in 16 bits.
MAX_EXPERTS = 2**15 - 1

#: Names of the array of prompt numbers in an `.npz` file, the likeliest first.
PROMPT_NAMES = ("prompt", "request")

#: Tokens whose routing is looked through at once.
_CHUNK = 2**14


@dataclass(frozen=True)
class Choices:
    """Expert numbers as a file has them, not yet checked.

    `chosen` is (tokens, layers, top_k), negative where nothing was chosen. `prompt` is (tokens,), None where the file
    does not say. `layers` are the numbers of the layers and `experts` is how many a layer has, None where unknown.
    `model_layers` counts all layers of the model, dense ones with them, None where unknown.
    """

    chosen: NDArray[Any]
    prompt: NDArray[Any] | None = None
    layers: Sequence[int] | None = None
    experts: int | None = None
    model_layers: int | None = None
    key: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadSample:
    """A sample, how many layers the model has as far as the file says, and what a person should know about it."""

    sample: RoutingSample
    model_layers: int
    notes: tuple[str, ...]

    def loads(self) -> NDArray[np.float64]:
        """Return (model layers, experts) the tokens routed to each expert; layers not sampled are zero."""
        result = np.zeros((self.model_layers, self.sample.experts))
        result[list(self.sample.layers)] = self.sample.counts()
        return result


def check_sample(
    choices: Choices, file: str, *, experts: int | None = None, layers: Sequence[int] | None = None
) -> ReadSample:
    """Return `choices` as a sample, and say in notes what was left out or taken for granted.

    - Layers in which no token chose anything are dense, and left out; so are top-k columns that no layer uses.
    - Tokens that lack a choice after that are padding, and left out.
    - Without `prompt`, all tokens are of one prompt.
    - Layers not numbered by the file or by `layers` are 0, 1, 2 ...
    - Where neither the file nor `experts` says how many experts a layer has, it is the largest number chosen + 1. A
      last expert that no token chose is then missing.

    Raises InputError, with the place, for a token that chose an expert twice in one layer (no router does: such a file
    is damaged, or padded with a number that is not negative), for numbers beyond the experts, for shapes that do not
    fit, for `experts` and `layers` that the file contradicts, and when no token is left.
    """
    chosen, key = choices.chosen, choices.key

    def refuse(message: str) -> InputError:
        return InputError(message, file=file, key=key)

    if chosen.dtype.kind not in "iu":
        raise refuse(f"holds {chosen.dtype.name[:40]}, expected whole expert numbers")
    if chosen.ndim != 3 or 0 in chosen.shape:
        raise refuse(f"found the shape {chosen.shape}, expected (tokens, layers, top_k), none of them 0")
    numbers = _layer_numbers(choices, layers, file)
    experts, notes = _experts(choices, experts, file)
    notes = [*choices.notes, *notes]
    prompt = _prompts(choices, chosen.shape[0], file, notes)
    highest = int(chosen.max())
    if highest >= experts:
        token, layer, _ = (int(index) for index in np.argwhere(chosen == highest)[0])
        raise refuse(
            f"token {token} chose expert {highest} in layer {numbers[layer]}, expected 0 to {experts - 1}"
        )
    missing = chosen < 0
    if missing.any():
        used = np.asarray(~missing.all(axis=(0, 2)))
        columns = np.asarray(~missing.all(axis=(0, 1)))
        if not used.any():
            raise refuse("no token chose an expert")
        chosen, missing = chosen[:, used][..., columns], missing[:, used][..., columns]
        numbers = tuple(number for number, kept in zip(numbers, used.tolist(), strict=True) if kept)
        whole = np.asarray(~missing.any(axis=(1, 2)))
        if not whole.any():
            layer = int(missing.any(axis=(0, 2)).argmax())
            raise refuse(
                f"every token lacks a choice in some layer, the first of them layer {numbers[layer]}"
            )
        if not whole.all():
            notes.append(
                f"{int((~whole).sum())} of {len(whole)} tokens lack a choice and were left out as padding"
            )
        chosen, prompt = chosen[whole], prompt[whole]
    small = np.ascontiguousarray(chosen, dtype=np.int16)
    _check_different(small, numbers, file, key)
    sample = RoutingSample(small, prompt, numbers, experts)
    return ReadSample(sample, max(choices.model_layers or 0, max(numbers) + 1), tuple(notes))


def _layer_numbers(choices: Choices, wanted: Sequence[int] | None, file: str) -> tuple[int, ...]:
    """Return the number of each layer on the axis."""
    stated = choices.layers
    if stated is not None and wanted is not None and list(stated) != list(wanted):
        raise InputError(
            f"holds the layers {_short(stated)}, expected {_short(wanted)}", file=file, key=choices.key
        )
    count = choices.chosen.shape[1]
    given = stated if stated is not None else wanted if wanted is not None else range(count)
    numbers = tuple(int(number) for number in given)
    if len(numbers) != count:
        raise InputError(
            f"found {count} layers, expected {len(numbers)}, which are {_short(numbers)}",
            file=file,
            key=choices.key,
        )
    if len(set(numbers)) != count or not all(0 <= number < MAX_LAYERS for number in numbers):
        raise InputError(
            f"numbers its layers {_short(numbers)}, expected different numbers from 0 to {MAX_LAYERS - 1}",
            file=file,
            key=choices.key,
        )
    return numbers


def _experts(choices: Choices, wanted: int | None, file: str) -> tuple[int, list[str]]:
    """Return how many experts a layer has, with a note where that is only inferred."""
    stated, notes = choices.experts, []
    if stated is not None and wanted is not None and stated != wanted:
        raise InputError(f"found {stated} experts, expected {wanted}", file=file, key=choices.key)
    experts = wanted if stated is None else stated
    if experts is None:
        experts = int(choices.chosen.max()) + 1
        notes.append(f"{experts} experts a layer, since {experts - 1} is the largest number chosen")
    if not experts <= MAX_EXPERTS:
        raise InputError(
            f"has {experts} experts a layer, expected at most {MAX_EXPERTS}", file=file, key=choices.key
        )
    return experts, notes


def _prompts(choices: Choices, tokens: int, file: str, notes: list[str]) -> NDArray[np.int64]:
    prompt = choices.prompt
    if prompt is None:
        notes.append("the file does not say where a prompt ends: all tokens count as one prompt")
        return np.zeros(tokens, dtype=np.int64)
    if prompt.dtype.kind not in "iu" or prompt.shape != (tokens,):
        raise InputError(
            f"found prompts of the shape {prompt.shape} and type {prompt.dtype.name[:40]}, "
            f"expected a whole number for each of {tokens} tokens",
            file=file,
            key=choices.key,
        )
    return prompt.astype(np.int64)


def _check_different(chosen: NDArray[np.int16], numbers: tuple[int, ...], file: str, key: str | None) -> None:
    """Raise InputError where a token chose an expert twice in one layer."""
    for start in range(0, len(chosen), _CHUNK):
        part = np.sort(chosen[start : start + _CHUNK], axis=-1)
        twice = part[..., 1:] == part[..., :-1]
        if twice.any():
            token, layer, place = (int(index) for index in np.argwhere(twice)[0])
            raise InputError(
                f"token {start + token} chose expert {part[token, layer, place]} twice in layer {numbers[layer]}, "
                "expected different experts (dense layers and padding are written as -1)",
                file=file,
                key=key,
            )


def _short(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number)[:20] for number in numbers[:8])
    return shown + (", ..." if len(numbers) > 8 else "")


def looks_like_choices(array: NDArray[Any]) -> bool:
    """Return whether a (tokens, layers, top_k) sample is likelier than (steps, layers, experts) counts.

    In a sample no row repeats a number; in counts of a hundred steps and layers some row always does.
    """
    if array.ndim != 3 or array.dtype.kind not in "iu" or array.shape[0] * array.shape[1] < 100:
        return False
    if array.shape[2] < 2:
        return False
    part = np.sort(array[:_CHUNK], axis=-1)
    return not bool((part[..., 1:] == part[..., :-1]).any())


def choices_in_npz(raw: bytes, path: Path) -> Choices:
    """Return the array `topk` of an `.npz` file, with `prompt` or `request`, `layers` and `experts` where it has them."""
    file = str(path)
    archive = open_archive(raw, file)
    names = npz_names(archive)
    if "topk" not in names:
        raise InputError(f"holds {listed(names)}, expected an array named `topk`", file=file)
    prompt = next((name for name in PROMPT_NAMES if name in names), None)
    layers = read_npz_array(archive, "layers", file) if "layers" in names else None
    experts = read_npz_array(archive, "experts", file) if "experts" in names else None
    if layers is not None and (layers.dtype.kind not in "iu" or layers.ndim != 1):
        raise InputError("expected a list of layer numbers", file=file, key="layers")
    if experts is not None and (experts.dtype.kind not in "iu" or experts.size != 1 or experts.min() < 1):
        raise InputError("expected one whole number of at least 1", file=file, key="experts")
    return Choices(
        read_npz_array(archive, "topk", file),
        read_npz_array(archive, prompt, file) if prompt else None,
        None if layers is None else [int(number) for number in layers[: MAX_LAYERS + 1]],
        None if experts is None else int(experts.reshape(())),
        key="topk",
    )
