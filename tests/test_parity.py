"""The original LRE's trajectories, float64: ours must follow within 1e-6.

`lre_trajectories.npz` holds what the original torch implementation did on one small problem, an
array of parameters after every step for each ``curvature/basis/inner``, and under ``inputs/`` what
it was fed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import curvature, inner

DATA = np.load(Path(__file__).parent / "lre_trajectories.npz")
INPUTS = {k.removeprefix("inputs/"): v for k, v in DATA.items() if k.startswith("inputs/")}
ENTRIES = [k for k in DATA if not k.startswith("inputs/")]


# From parameters and the inputs of a step, its gradient and extra arguments.


def given(x, g):
    """Open loop: the gradients are used as they are."""
    return g, {}


def quadratic(x, a, b):
    value_fn = lambda x: x @ a @ x / 2 - b @ x
    return a @ x - b, {"value_fn": value_fn}


def losses(x, matrix, y):
    losses_fn = lambda x: (matrix @ x - y) ** 2 / 2
    return matrix.T @ (matrix @ x - y), {"losses_fn": losses_fn}


def residuals(x, matrix, y):
    return matrix.T @ (matrix @ x - y), {"residuals_fn": lambda x: matrix @ x - y}


# A new name belongs in one of these tables; every entry of known names is tried.
CURVATURES = {
    "covariance": (curvature.Covariance(), given, "g", {}),
    "covariance_every3": (curvature.Covariance(), given, "g", {"update_every": 3}),
    "hutchinson": (
        curvature.HutchinsonHessian(curvature.GradientProbe(), within=False),
        quadratic,
        "Ab",
        {"symmetrize": True},
    ),
    "fisher": (curvature.EmpiricalFisher(), losses, "Xy", {}),
    "gauss_newton": (curvature.GaussNewton(), residuals, "Xy", {}),
}

BASES = {
    "ggt8": lro.basis.GGT(8),
    "eigen6": lro.basis.Eigen(6, 0.9),
    "eigen6_sum": lro.basis.Eigen(6, None, eig_tol=1e-8),
    "full": lro.basis.FullMatrix(),
}

INNERS = {
    "adam": inner.Adam(),
    "rmsprop": inner.Adam(b1=0.0),
    "fulladam": inner.FullMatrixAdam(),
    "cubic": inner.CubicAdam(),
    "lion": inner.Lion(),
    "ema_linvsqrt": (inner.EMA(), inner.LInvSqrt()),
    "linvsqrt_ema": (inner.LInvSqrt(), inner.EMA()),
    "linv": inner.LInv(),
    "clipnorm": (inner.Adam(), inner.ClipNorm(0.5)),
    "good": (inner.Adam(), inner.Cautious(), inner.ClipNormByEMA(normalize=True)),
    "hutch": inner.HutchinsonAdam(),
    "fullhutch": inner.FullMatrixHutchinsonAdam(),
    "bfgsadam": inner.FullMatrixBFGSAdam(),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("entry", ENTRIES)
def test_trajectory(entry):
    """No entry is left out: a name that is in no table is an error."""
    measured, kept, inside = entry.split("/")
    part, evaluate, names, options = CURVATURES[measured]
    tx = lro.lre(1e-2, part, BASES[kept], INNERS[inside], **options)

    @jax.jit
    def run(x, inputs):
        def step(carry, now):
            x, state = carry
            g, extra = evaluate(x, *now)
            updates, state = tx.update(g, state, x, **extra)
            return (x + updates, state), x + updates

        return jax.lax.scan(step, (x, tx.init(x)), inputs)

    (_, state), ours = run(jnp.asarray(INPUTS["x0"]), [jnp.asarray(INPUTS[k]) for k in names])
    assert ours.shape == DATA[entry].shape
    np.testing.assert_allclose(ours, DATA[entry], rtol=0, atol=1e-6)
    assert sum(int(n[0]) for n in lro.diagnose.find(state).events) == 0
