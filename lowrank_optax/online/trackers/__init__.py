"""Streaming trackers of the leading eigenpairs of ``E v v^T``, one vector at a time.

All have ``init(key, example)``, ``update(state, v)``, ``operator(state)`` and ``resume(operator,
count, key)``.

The functions in small letters make a tracker of a basis of the engine, `FromBasis`; the classes
keep rows of their own. `brand`, `history_pca`, `opast`, `PAST` and `CCIPCA` have no step size: try
them first. `oja`, `krasulina`, `ada_oja`, `grouse`, `Sanger` and `EigenGame` are stochastic ascent.
`NoisyPower` works in blocks, `PETRELS` takes vectors with missing entries, and
`frequent_directions` has a guarantee on every stream. ``benchmarks/trackers.py`` measures what each
reaches and costs.

Some names also stand in `lowrank_optax.spectral`. The methods there train the parameters of
functions on batches; the trackers here turn stored rows. What both do is the same algorithm.
"""

from lowrank_optax.online.trackers._tracker import OnRows, Tracker, TrackerState
from lowrank_optax.online.trackers.bases import (
    FromBasis,
    ada_oja,
    brand,
    frequent_directions,
    grouse,
    history_pca,
    krasulina,
    oja,
    opast,
)
from lowrank_optax.online.trackers.deflation import CCIPCA, EigenGame, Sanger
from lowrank_optax.online.trackers.projection import PAST, PETRELS, NoisyPower

__all__ = [
    "CCIPCA",
    "EigenGame",
    "FromBasis",
    "NoisyPower",
    "OnRows",
    "PAST",
    "PETRELS",
    "Sanger",
    "Tracker",
    "TrackerState",
    "ada_oja",
    "brand",
    "frequent_directions",
    "grouse",
    "history_pca",
    "krasulina",
    "oja",
    "opast",
]
