"""What a subspace is learned for: losses over codes, with closed-form gradients.

Every loss is an average over the vectors ``v`` of a batch, with codes ``z = A v``. Its gradient is
a sum of outer products ``sum_j a_j b_j^T`` with ``a_j`` in the space of codes and ``b_j`` in that
of vectors, so that a purpose costs a few passes over ``A``. Losses are divided by the mean energy
``E = E‖v‖²`` of the stream, so that they have no unit.
"""

from lowrank_optax.online.purposes._purpose import (
    Batch,
    Pairs,
    Purpose,
    Stream,
    Terms,
    View,
    Weight,
)
from lowrank_optax.online.purposes.dynamics import Dynamics, Lagged
from lowrank_optax.online.purposes.energy import Avoidance, EditLocality, OldTask, Reconstruction
from lowrank_optax.online.purposes.functions import Activation, Custom
from lowrank_optax.online.purposes.moments import Entropy, Whitening

__all__ = [
    "Activation",
    "Avoidance",
    "Batch",
    "Custom",
    "Dynamics",
    "EditLocality",
    "Entropy",
    "Lagged",
    "OldTask",
    "Pairs",
    "Purpose",
    "Reconstruction",
    "Stream",
    "Terms",
    "View",
    "Weight",
    "Whitening",
]
