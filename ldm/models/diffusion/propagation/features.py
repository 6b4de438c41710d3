"""What reaches the decoder at nodes where the encoder does not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ldm.models.diffusion.propagation.plan import PROPAGATIONS
from ldm.modules.diffusionmodules.features import Features


@dataclass(frozen=True)
class Propagation:
    """The features of the last key nodes, and those in between made of them.

    degree: of the polynomial in the timestep that goes through the last degree + 1 key nodes; 0 holds the last one's
        features, as the paper does; -1 goes through none and is zero. Where there are fewer key nodes yet, the degree
        is what they allow.
    keys:   timestep and features of the key nodes that are kept, oldest first.

    Memory: degree + 1 sets of features, and at least one.
    Source: holding: Faster Diffusion (arXiv 2312.09608); the polynomial is Lagrange's.
    """

    degree: int = 0
    keys: tuple[tuple[float, Features], ...] = ()

    @staticmethod
    def named(name: str) -> Propagation:
        """One of PROPAGATIONS, before the first key node."""
        return Propagation(PROPAGATIONS[name])

    def key(self, t: float, features: Features) -> Propagation:
        """After one more key node."""
        # Guidance that begins or ends changes the batch: features before that have nothing to say of those after.
        # Solvers that come back to a timestep replace its features.
        kept = [old for old in self.keys if len(old[1]) == len(features) and old[0] != t]
        return Propagation(self.degree, (*kept, (t, features))[-max(self.degree, 0) - 1 :])

    def shared(self, share: Callable[[Features], Features]) -> Propagation:
        """With what several nodes compute of the last key node's features; computed the first time only."""
        t, last = self.keys[-1]
        return self if last.shared else Propagation(self.degree, (*self.keys[:-1], (t, share(last))))

    def at(self, t: float) -> Features:
        """What the decoder gets at timestep t; at the last key node, exactly its features."""
        last_t, last = self.keys[-1]
        if t == last_t or (len(self.keys) == 1 and self.degree >= 0):
            return last
        return Features.combine([features for _, features in self.keys], self.weights(t))

    def weights(self, t: float) -> list[float]:
        """Of the kept key nodes in the features at timestep t; they sum to 1, or are zero for degree -1."""
        if self.degree < 0:
            return [0.0] * len(self.keys)
        ts = [key_t for key_t, _ in self.keys]
        weights = []
        for i, here in enumerate(ts):
            weight = 1.0
            for other in ts[:i] + ts[i + 1 :]:
                weight *= (t - other) / (here - other)
            weights.append(weight)
        return weights
