"""A routing sample: which experts the router chose for each token, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RoutingSample:
    """Token-level routing.

    `chosen` is (tokens, layers, top_k) expert numbers, all different within a token and layer. `prompt` is (tokens,)
    the number of the request a token belongs to. `layers` are the numbers of the layers sampled, in the order of the
    axis; `experts` is how many experts a layer has.
    """

    chosen: NDArray[np.int16]
    prompt: NDArray[np.int64]
    layers: tuple[int, ...]
    experts: int

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return int(self.chosen.shape[0])

    @property
    def top_k(self) -> int:
        """Experts a token is sent to in one layer."""
        return int(self.chosen.shape[2])

    def counts(self) -> NDArray[np.float64]:
        """Return (layers, experts) tokens routed to each expert."""
        return np.stack(
            [
                np.bincount(self.chosen[:, layer].ravel(), minlength=self.experts).astype(np.float64)
                for layer in range(len(self.layers))
            ]
        )

    def incidence(self, layer: int) -> NDArray[np.float32]:
        """Return (tokens, experts): 1 where the token chose the expert at position `layer` of the layers, else 0."""
        result = np.zeros((self.tokens, self.experts), dtype=np.float32)
        result[np.arange(self.tokens)[:, None], self.chosen[:, layer]] = 1.0
        return result

    def of_prompts(self, prompts: NDArray[np.int64]) -> RoutingSample:
        """Return the tokens of `prompts` alone."""
        kept = np.isin(self.prompt, prompts)
        return RoutingSample(self.chosen[kept], self.prompt[kept], self.layers, self.experts)
