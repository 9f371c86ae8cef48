"""Streaming trackers of the leading eigenpairs of ``E v v^T``, one vector at a time.

All have ``init(key, example)``, ``update(state, v)``, ``operator(state)`` and ``start(operator,
count, key)``. `Brand`, `HistoryPCA`, `OPAST`, `PAST` and `CCIPCA` have no step size and are the
ones to try first; `Oja`, `Krasulina`, `AdaOja`, `GROUSE`, `Sanger` and `EigenGame` are stochastic
ascent; `NoisyPower` works in blocks, `PETRELS` knows missing entries, and `FrequentDirections` has
a guarantee on every stream. ``benchmarks/trackers.py`` measures what each reaches and costs.
"""

from lowrank_optax.online.trackers._tracker import Tracker, TrackerState
from lowrank_optax.online.trackers.bases import (
    GROUSE,
    OPAST,
    AdaOja,
    Brand,
    FrequentDirections,
    HistoryPCA,
    Krasulina,
    Oja,
)
from lowrank_optax.online.trackers.deflation import CCIPCA, EigenGame, Sanger
from lowrank_optax.online.trackers.projection import PAST, PETRELS, NoisyPower

__all__ = [
    "AdaOja",
    "Brand",
    "CCIPCA",
    "EigenGame",
    "FrequentDirections",
    "GROUSE",
    "HistoryPCA",
    "Krasulina",
    "NoisyPower",
    "OPAST",
    "Oja",
    "PAST",
    "PETRELS",
    "Sanger",
    "Tracker",
    "TrackerState",
]
