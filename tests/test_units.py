"""Losses in other units: what every recipe claims about its rate on a ladder of scaled losses.

The loss is multiplied by powers of two from about 1e-6 to 1e6, so that scaling itself rounds
nothing. With the rate times ``unit**rate`` and the numbers that a docstring gives in some unit
converted along, the parameters have to go the same way; with these numbers at their defaults, the
recipe still has to train.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import basis, curvature

LADDER = 2.0 ** np.array([-20, -10, 0, 10, 20])
STEPS = 12
A = np.random.default_rng(0).normal(size=(16, 12)) * np.geomspace(2, 0.2, 12)
START = {"w": jnp.zeros((3, 3)), "b": jnp.zeros(3)}


def residuals(params):
    x = jnp.concatenate([jnp.ravel(params["w"]), params["b"]])
    return jnp.asarray(A, x.dtype) @ (x - 1) + 0.1 * jnp.tanh(x[0])


# From the unit of what a docstring gives in units of something, the recipe; then the power of the
# loss's unit that the rate has to be multiplied by, 0 where the recipe is invariant.
PARTS = (lro.inner.Cautious(), lro.inner.ClipNormByEMA(normalize=True))
BASES = basis.GGT(5), basis.Eigen(5), basis.OPAST(5), basis.FrequentDirections(5)
TWO_COLUMNS = {"symmetrize": False}  # one column (z + Hz)/2 adds a probe to a gradient
INVARIANT = {
    "soap_muon": (lambda c: lro.soap_muon(1e-2, eps=1e-8 * c), 0),
    "soap": (lambda c: lro.soap(1e-2, eps=1e-8 * c), 0),
    "soap_of_low_rank": (lambda c: lro.soap(1e-2, rank=2, eps=1e-8 * c), 0),
    "galore": (lambda c: lro.galore(1e-2, rank=2, update_every=3, scale=1.0, eps=1e-8 * c), 0),
    "full_matrix_adam": (lambda c: lro.full_matrix_adam(0.1, rank=20, eps=1e-16 * c**2), 0),
    "whitened_adam": (lambda c: lro.whitened_adam(0.1, rank=5, eps=1e-8 * c**0.5), 0),
    "levenberg_marquardt": (lambda c: lro.levenberg_marquardt(), 0),
    "lowrank_newton": (lambda c: lro.lowrank_newton(0.5, rank=4), 0),
    "sr1": (lambda c: lro.lowrank_newton(0.5, rank=4, curvature=curvature.SR1()), 0),
} | {
    f"lre_in_{type(kept).__name__}": (
        lambda c, kept=kept: lro.lre(0.1, basis=kept, inner=(lro.inner.Adam(eps=1e-8 * c), *PARTS)),
        0,
    )
    for kept in BASES
}
WITH_A_UNIT = {
    "ggt": (lambda c: lro.ggt(0.1, rank=20, eps=1e-2 * c), 0),
    "whiten": (lambda c: optax.chain(lro.whiten(5), optax.scale(-0.1)), -0.5),
    "whiten_by_the_root": (
        lambda c: optax.chain(lro.whiten(5, power=-0.5), optax.scale(-0.1)),
        0,
    ),
    "natural_gradient": (lambda c: lro.natural_gradient(0.1, rank=6, damping=c**2), 1),
    "gauss_newton": (lambda c: lro.gauss_newton(0.5, batch=20, damping=1e-3 * c), 0),
    "adahessian": (lambda c: lro.adahessian(0.1, rank=4, eps=1e-8 * c, **TWO_COLUMNS), 0),
    "sophia_h": (
        lambda c: lro.sophia_h(0.01, rank=4, eps=1e-12 * c, update_every=3, **TWO_COLUMNS),
        0,
    ),
}
STEADY = {"sr1": 6}
"""Steps to compare, where the method makes more of a rounding with every step: all but here."""


@functools.cache
def walk(name):
    """From units of the loss and of the constants: parameters ``(STEPS, d)``, relative losses."""
    make, power = (INVARIANT | WITH_A_UNIT)[name]

    @jax.jit
    def run(unit, constants):
        tx = make(constants)
        r = lambda p: jnp.sqrt(unit) * residuals(p)
        losses = lambda p: unit * residuals(p) ** 2 / 2
        value = lambda p: jnp.sum(r(p) ** 2) / 2
        extra = {"value_fn": value, "losses_fn": losses, "residuals_fn": r}

        def step(carry, _):
            p, state = carry
            u, state = tx.update(jax.grad(value)(p), state, p, **extra)
            p = jax.tree.map(lambda x, y: x + unit**power * y, p, u)
            return (p, state), (jnp.concatenate([jnp.ravel(p["w"]), p["b"]]), value(p) / unit)

        return jax.lax.scan(step, (START, tx.init(START)), None, length=STEPS)[1]

    return lambda unit, constants: jax.tree.map(
        np.asarray, run(jnp.float32(unit), jnp.float32(constants))
    )


@pytest.mark.parametrize("name", INVARIANT | WITH_A_UNIT)
def test_in_another_unit_a_recipe_goes_the_same_way(name):
    """The rate by its power of the unit, and the constants that have one converted along."""
    plain, values = walk(name)(1.0, 1.0)
    length = np.max(np.linalg.norm(plain, axis=1))
    assert length > 1e-2 and values[-1] < values[0]
    for unit in LADDER:
        way = walk(name)(unit, unit)[0]
        # A cautious step is not continuous where a coordinate of the gradient is rounding.
        apart = np.linalg.norm(way - plain, axis=1)[: STEADY.get(name)]
        assert np.max(apart) < 3e-3 * length, unit


@pytest.mark.parametrize("name", INVARIANT)
def test_what_claims_to_be_invariant_is_so_with_its_defaults(name):
    """Down to gradients of a hundred times ``eps``, which nobody has to think of."""
    values = walk(name)(1.0, 1.0)[1]
    for unit in LADDER:
        some = slice(STEADY.get(name))
        np.testing.assert_allclose(walk(name)(unit, 1.0)[1][some], values[some], rtol=0.05)
