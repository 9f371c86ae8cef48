"""The online operator ``G = A^T H A``: learnt from a stream of vectors, for a purpose."""

from lowrank_optax.online import streams, trackers
from lowrank_optax.online.basis import Learned
from lowrank_optax.online.learner import Info, Learner, LearnerState, composite, learner
from lowrank_optax.online.operator import Operator, merge, signed_pca
from lowrank_optax.online.purposes import (
    Activation,
    Avoidance,
    Batch,
    Custom,
    Dynamics,
    EditLocality,
    Entropy,
    OldTask,
    Purpose,
    Reconstruction,
    Whitening,
)

__all__ = [
    "Activation",
    "Avoidance",
    "Batch",
    "Custom",
    "Dynamics",
    "EditLocality",
    "Entropy",
    "Info",
    "Learned",
    "Learner",
    "LearnerState",
    "Operator",
    "OldTask",
    "Purpose",
    "Reconstruction",
    "Whitening",
    "composite",
    "learner",
    "merge",
    "signed_pca",
    "streams",
    "trackers",
]
