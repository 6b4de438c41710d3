"""Plans that decide while a run goes on which nodes are key nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ldm.models.diffusion.propagation.plan import Batch, Change, Compute, Plan

PROBES = ("latent", "time")


@dataclass(frozen=True)
class OnlinePlan:
    """A node is a key node if a cheap probe has changed enough since the last key node.

    threshold: relative change above which the encoder runs again, > 0.
    probe:     'latent' = the latent itself; 'time' = the network's embedding of the timestep, known ahead, so that
        the decoders of a group can share batches.
    parallel, propagate: as in `Plan`; parallel is without effect on the probe 'latent'.

    With the probe 'latent' the choice belongs to one image: a run of several together is refused.
    """

    num_nodes: int
    threshold: float
    probe: str = "latent"
    parallel: int = 1
    propagate: str = "hold"
    branch: ClassVar[int] = 0
    refresh: ClassVar[int] = 0
    control: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    levels: ClassVar[frozenset[Compute]] = frozenset({Compute.DECODER})

    @property
    def per_image(self) -> bool:
        """Whether what runs when depends on the image."""
        return self.probe == "latent"

    def __post_init__(self) -> None:
        if self.probe not in PROBES:
            raise ValueError(f"probe must be one of {', '.join(PROBES)}; got {self.probe!r}")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold must be above 0 and finite; got {self.threshold:g}")
        Plan(self.num_nodes, (0,), self.parallel, propagate=self.propagate)

    def batches(self, change: Change) -> Iterator[Batch]:
        """The run's batches, each decided when the nodes before it are done."""
        key, i = 0, 0
        while i < self.num_nodes:
            compute = Compute.FULL if i == 0 or change(self.probe, i, key) > self.threshold else Compute.DECODER
            if compute is Compute.FULL:
                key = i
            stop = i + 1
            if self.probe == "time":
                while stop < min(i + self.parallel, self.num_nodes) and change("time", stop, key) <= self.threshold:
                    stop += 1
            yield Batch(range(i, stop), compute)
            i = stop

    def settings(self) -> dict[str, Any]:
        """What results depend on, as JSON values."""
        rounded = f"{self.threshold:g}"  # as it has always been written, where that says it all
        threshold = rounded if float(rounded) == self.threshold else repr(self.threshold)
        return {"online": f"{self.probe}:{threshold}", "propagate": self.propagate}
