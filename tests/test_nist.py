"""`levenberg_marquardt` with its defaults on NIST's nonlinear regression problems, in float64."""

import functools

import jax
import jax.numpy as jnp
import nist
import numpy as np
import optax
import pytest

import lowrank_optax as lro

STEPS = 50


@functools.partial(jax.jit, static_argnums=(0, 4))
def fit(model, x, y, b, scaling=None):
    """The parameters after `STEPS` steps and the state; compiled once for each model and shape."""
    tx = lro.levenberg_marquardt(scaling=scaling)

    def step(carry, _):
        b, state = carry
        updates, state = tx.update(b, state, b, residuals_fn=lambda b: model(b, x) - y)
        return (optax.apply_updates(b, updates), state), None

    return jax.lax.scan(step, (b, tx.init(b)), None, length=STEPS)[0]


def check(name, start, scaling=None):
    data = nist.DATA[name]
    x, y = nist.observations(name)
    b, state = fit(nist.MODELS[name], x, y, jnp.array(data["starts"][start]), scaling)
    assert nist.digits(b, data["certified"]) > 9.5
    # Lanczos1 has residuals of rounding alone.
    np.testing.assert_allclose(2 * state.loss, data["squares"], rtol=1e-9, atol=1e-20)
    assert int(state.nonfinite) == 0


@pytest.mark.parametrize("start", [0, 1], ids=["far", "near"])
@pytest.mark.parametrize("name", nist.MODELS)
def test_certified_digits(name, start, x64):
    check(name, start)


@pytest.mark.parametrize("scaling", [0.0, 1.0], ids=["Marquardt", "Moré"])
def test_scaled_damping_has_no_units(scaling, x64):
    """Parameters in other units take the same steps, up to rounding."""
    x, y = nist.observations("Rat42")
    start, units = jnp.array(nist.DATA["Rat42"]["starts"][0]), jnp.array([1e-6, 1e2, 1e5])
    tx = lro.levenberg_marquardt(scaling=scaling)

    @jax.jit
    def run(start, units):
        def step(carry, _):
            b, state = carry
            fn = lambda b: nist.MODELS["Rat42"](b / units, x) - y
            updates, state = tx.update(b, state, b, residuals_fn=fn)
            return (optax.apply_updates(b, updates), state), state.loss

        return jax.lax.scan(step, (start * units, tx.init(start)), None, length=4)[1]

    np.testing.assert_allclose(run(start, units), run(start, jnp.ones(3)), rtol=1e-6)
