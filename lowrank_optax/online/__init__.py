"""The online operator ``G = A^T H A``: learned from a stream of vectors, for a purpose.

`learner` trains ``A`` by gradients of the losses of its purposes. A tracker (`trackers`) follows
the leading eigenpairs of the stream's second moments, which is the purpose of PCA, without
gradients. Both give an `Operator`; `streams` gives vectors of a model for either.

`Operator` is a low-rank matrix with products, powers and solves. It has nothing in common with
`lowrank_optax.spectral.operators.Operator`, which is what a spectral decomposition is taken of.
"""

from lowrank_optax.online import streams, trackers
from lowrank_optax.online.basis import Learned
from lowrank_optax.online.learner import Info, Learner, LearnerState, learner
from lowrank_optax.online.loss import composite
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
    Pairs,
    Purpose,
    Reconstruction,
    Stream,
    Terms,
    View,
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
    "Pairs",
    "Purpose",
    "Reconstruction",
    "Stream",
    "Terms",
    "View",
    "Whitening",
    "composite",
    "learner",
    "merge",
    "signed_pca",
    "streams",
    "trackers",
]
