"""Registries of parts, from which the contract suite is generated: a new part is one line here."""

import optax

import lowrank_optax as lro
from lowrank_optax import (
    SCALAR,
    SECOND_MOMENT,
    VECTOR,
    basis,
    curvature,
    inner,
    online,
    per_leaf,
)
from lowrank_optax.online import trackers

CURVATURES = {
    "covariance": curvature.Covariance(),
    "covariance_times_loss": lro.experimental.CovarianceTimesLoss(),
    "gradient_ema": curvature.GradientEMA(),
    "updates": lro.experimental.Updates(),
    "parameters": lro.experimental.Parameters(),
    "unrolled_gauss_newton": lro.experimental.UnrolledGaussNewton(history=3),
    "hutchinson": curvature.HutchinsonHessian(),
    "squared_hessian": curvature.SquaredHessian(),
    "bfgs": curvature.BFGS(),
    "bfgs_of_gradients": curvature.BFGS(product=curvature.GradientDifference()),
    "sr1": curvature.SR1(),
    "shor": curvature.ShorR(),
    "fisher": curvature.EmpiricalFisher(),
    "gauss_newton": curvature.GaussNewton(),
}

# The everyday bases: every inner part is tried in each of them.
BASES = {
    "ggt": basis.GGT(4),
    "eigen": basis.Eigen(4, buffer=3),
    "full": basis.FullMatrix(),
}

MORE_BASES = {
    "common_directions": basis.CommonDirections(4),
    "frequent_directions": basis.FrequentDirections(4),
    "grouse": basis.GROUSE(4),
    "hebbian": basis.Hebbian(4),
    "histogram": basis.Histogram(4),
    "history_pca": basis.HistoryPCA(4),
    "learned": online.Learned(online.learner(4, (online.Dynamics(),), optax.adam(1e-2))),
    "low_rank_factor": basis.LowRankFactor(4),
    "nystrom": basis.Nystrom(4),
    "opast": basis.OPAST(4),
    "random": basis.Random(4),
    "permutation": basis.RandomPermutation(4),
    "randomized": basis.RandomizedEigen(4),
    "subspace_iteration": basis.SubspaceIteration(4),
    "topk": basis.TopK(4),
    "weighted_permutation": basis.WeightedPermutation(4),
}

# Bases with other rules than their defaults, which take other paths through the same code.
RULES = {
    "stiefel": basis.Hebbian(4, rule=basis.StiefelRule()),
    "cayley": basis.Hebbian(4, rule=basis.CayleyAdamG()),
    "drop_oldest": basis.LowRankFactor(4, basis.DropOldest()),
    "drop_smallest": basis.LowRankFactor(4, basis.DropSmallest()),
}

# From a rank and the length of the stream, a tracker; and how many vectors it is shown at once.
TRACKERS = {
    "Oja": (lambda rank, n: trackers.oja(rank), 1),
    "Oja, 20 at once": (lambda rank, n: trackers.oja(rank, buffer=20), 20),
    "Krasulina": (lambda rank, n: trackers.krasulina(rank), 1),
    "AdaOja": (lambda rank, n: trackers.ada_oja(rank), 1),
    "Sanger": (lambda rank, n: trackers.Sanger(rank), 1),
    "CCIPCA": (lambda rank, n: trackers.CCIPCA(rank), 1),
    "Brand, m = r": (lambda rank, n: trackers.brand(rank, slots=rank), 1),
    "Brand": (lambda rank, n: trackers.brand(rank), 1),
    "HistoryPCA": (lambda rank, n: trackers.history_pca(rank), 1),
    "PAST": (lambda rank, n: trackers.PAST(rank), 1),
    "OPAST": (lambda rank, n: trackers.opast(rank), 1),
    "GROUSE": (lambda rank, n: trackers.grouse(rank), 1),
    "PETRELS": (lambda rank, n: trackers.PETRELS(rank), 1),
    "NoisyPower": (lambda rank, n: trackers.NoisyPower(rank, block=n // 8), 1),
    "EigenGame": (lambda rank, n: trackers.EigenGame(rank), 1),
    "FrequentDirections": (lambda rank, n: trackers.frequent_directions(rank), 1),
}

DEFAULT = (inner.Adam(), inner.Cautious(), inner.ClipNormByEMA(normalize=True))

# The default with a large eps: Adam does not blow up rounding where the gradient is zero in truth.
STEADY = (inner.Adam(eps=1e-3), *DEFAULT[1:])

INNERS = {
    "default": DEFAULT,
    "adam": inner.Adam(),
    "amsgrad": inner.Adam(amsgrad_decay=1.0),
    "amsgrad_decaying": inner.Adam(amsgrad_decay=0.9),
    "adam_centred": inner.Adam(centred=True),
    "rmsprop": inner.RMSProp(),
    "fulladam": inner.FullMatrixAdam(),
    "fulladam_amsgrad": inner.FullMatrixAdam(amsgrad_decay=0.9),
    "cubic_adam": inner.CubicAdam(),
    "hutchinson_adam": inner.HutchinsonAdam(),
    "hutchinson_amsgrad": inner.HutchinsonAdam(amsgrad_decay=0.9),
    "full_hutchinson_adam": inner.FullMatrixHutchinsonAdam(),
    "bfgs_adam": inner.FullMatrixBFGSAdam(),
    "lion": inner.Lion(),
    "ema": inner.EMA(debias=True),
    "linvsqrt": inner.LInvSqrt(),
    "linv": inner.LInv(),
    "natural_gradient": inner.NaturalGradient(),
    "damped_least_squares": inner.DampedLeastSquares(),
    "cubic_newton": inner.CubicNewton(),
    "third_order": inner.ThirdOrder(),
    "cautious": inner.Cautious(normalize=True),
    "clip_norm": inner.ClipNorm(0.5),
    "clip_value": inner.ClipValue(0.5),
    "clip_norm_by_ema": inner.ClipNormByEMA(),
    "copy_grad_sign": inner.CopyGradSign(),
    "normalize": inner.Normalize(),
    "sign": inner.Sign(),
    "nan_to_zero": inner.NanToZero(),
    "optax": inner.Optax(
        optax.chain(optax.scale_by_adam(), optax.scale(0.5)),
        laws=(optax.ScaleByAdamState(SCALAR, VECTOR, SECOND_MOMENT), optax.EmptyState()),
    ),
}

# Those whose rule commutes with rotations of the coordinates, and so cannot tell one eigenvector of
# a repeated eigenvalue from another.
ROTATION_FREE = ("linvsqrt", "fulladam", "ema", "clip_norm_by_ema")


def combinations():
    """Names of curvature, basis, inner parts: all that the contract suite tries."""
    for inside in INNERS:
        for kept in BASES:
            yield provider(kept, inside), kept, inside
    for kept in MORE_BASES:
        yield provider(kept, "default"), kept, "default"
    for measured in CURVATURES:
        if measured != "covariance":
            yield measured, "eigen", "default"


def provider(kept, inside):
    """The first curvature that has what basis and inner parts need."""
    part = (BASES | MORE_BASES)[kept]
    needs = (part.needs | getattr(inner.as_inner(INNERS[inside]), "needs", frozenset())) - (
        part.provides
    )
    return next(name for name, c in CURVATURES.items() if needs <= c.provides)


# Recipes ----------------------------------------------------------------------------------------

RECIPES = {
    "lre": {"learning_rate": 1.0, "basis": basis.GGT(5)},
    "ggt": {"learning_rate": 1e-1, "rank": 5},
    "full_matrix_adam": {"learning_rate": 1e-2, "rank": 5},
    "whiten": {"rank": 5},
    "whitened_adam": {"learning_rate": 1e-2, "rank": 5},
    "lowrank_newton": {"learning_rate": 0.3, "rank": 5},
    "adahessian": {"learning_rate": 3e-2, "rank": 5},
    "sophia_h": {"learning_rate": 1e-2, "rank": 5, "update_every": 2},
    "natural_gradient": {"learning_rate": 0.1, "rank": 5},
    "gauss_newton": {"learning_rate": 0.5, "batch": 24, "damping": 1e-1},
    "galore": {"learning_rate": 1e-2, "rank": 2},
    "soap": {"learning_rate": 1e-2},
    "soap_muon": {"learning_rate": 1e-2},
    "muon": {"learning_rate": 1e-2},
    "normuon": {"learning_rate": 1e-2},
    "kl_soap": {"learning_rate": 1e-2},
    "kl_shampoo": {"learning_rate": 1e-2},
    "shampoo": {"learning_rate": 1e-2},
    "levenberg_marquardt": {},
    "spring": {"learning_rate": 0.5},
}
"""Every public recipe, with arguments that keep it small."""

FURTHER = {
    "per_leaf": ("lre", {"learning_rate": 1.0, "basis": basis.Eigen(3), "groups": per_leaf}),
    "soap_low_rank": ("soap", {"learning_rate": 1e-2, "rank": 2}),
    "soap_muon_low_rank": ("soap_muon", {"learning_rate": 1e-2, "rank": 2}),
}
"""Recipes with other arguments, to which the same applies."""


def recipe(name, **options):
    """The optimizer of that name, which takes extra arguments."""
    maker, kwargs = FURTHER.get(name) or (name, RECIPES[name])
    tx = getattr(lro, maker)(**kwargs | options)
    # Whitening alone turns a gradient and takes no step.
    tx = optax.chain(tx, optax.scale(-1e-1)) if name == "whiten" else tx
    return optax.with_extra_args_support(tx)
