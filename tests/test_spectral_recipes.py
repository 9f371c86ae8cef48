"""What is chosen where nothing is: networks, proposals, and the operators of the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import _spectrum
from lowrank_optax import spectral as s
from lowrank_optax.spectral import operators as ops


@pytest.mark.parametrize(
    ("potential", "dimension", "energy", "largest"),
    [
        (ops.Harmonic(), 1, 16.0, 4.0),
        (ops.Harmonic(2.0), 3, 16.0, 2.0),
        (ops.Hydrogen(), 2, 0.0, 32.0),
        (ops.Hydrogen(), 2, -0.25, 4.0),
        (lambda x: jnp.sum(jnp.square(x) / jnp.array([1.0, 64.0])), 2, 1.0, 8.0),
    ],
)
def test_proposals_reach_as_far_as_a_classical_particle(potential, dimension, energy, largest):
    scales = ops.classical(potential, dimension, energy).scales
    assert scales[-1] == largest and scales[0] <= 0.5


def test_networks_follow_the_points_whatever_their_unit():
    wide, fine = (
        s.networks.default(ops.Langevin(ops.Harmonic(), ops.gaussian(2, u)), 3) for u in (64.0, 1.0)
    )
    assert wide.features.scales == tuple(64 * scale for scale in fine.features.scales)
    assert fine.features.scales[1] == 1 and fine.features.kink and fine.modes == 3
    x = jax.random.normal(jax.random.key(0), (200, 1))
    left, right = s.networks.default(ops.CanonicalDependence(x, 100 * x), 2)
    assert right.features.scales[0] == 128 * left.features.scales[0]
    assert not left.features.kink


def test_no_kink_on_a_line():
    """A kink makes the operator lose its symmetry, and fits find values above the largest."""
    operator = ops.Schrodinger(ops.Harmonic(), ops.gaussian(1, 1.0), shift=4.0)
    x = np.linspace(-10, 10, 4000, dtype=np.float32)[:, None]
    batch = x, np.full(len(x), -np.log(20), np.float32)
    kinked = s.networks.ScaleFeatures((0.5, 1.0), waves=4)
    smooth = s.networks.default(operator, 2).features.clone(waves=4)
    for features, low, high in ((kinked, 0.1, np.inf), (smooth, 0.0, 1e-4)):
        function = lambda x, features=features: features.apply({}, x)
        f, tf = jax.jit(lambda batch, g=function: operator.apply(g, batch))(batch)
        matrix = np.asarray(f.T @ tf)
        assert low <= abs(matrix - matrix.T).max() / abs(matrix).max() < high


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: s.fit(ops.Matrix(np.eye(2)), 2), "not vectors"),
        (lambda: s.fit(ops.Langevin(ops.Harmonic(), ops.gaussian(1, 1.0)), 0), "network"),
        (lambda: ops.classical(ops.Harmonic(), 0, 1.0), "dimension"),
        (lambda: ops.classical(ops.Harmonic(), 1, 1.0, largest=0.0), "largest"),
        (lambda: ops.classical(ops.Harmonic(), 1, -1.0), "higher"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_energies_on_a_line_are_the_oscillators():
    got = _spectrum.energies(lambda x: x[0] ** 2, 6, half_width=8.0, points=120)
    np.testing.assert_allclose(got, [1, 3, 5, 7, 9, 11], rtol=1e-10)


@pytest.mark.parametrize("name", _spectrum.OPERATORS)
def test_truths_are_descending_and_applied_operators_finite(name):
    problem = _spectrum.OPERATORS[name]()
    truth = problem.truth(3)
    assert (np.diff(truth) <= 1e-12).all() and (truth > 0).all()
    operator = problem.operator
    batch = operator.sample(jax.random.key(0), 16, operator.init())
    waves = lambda x: jnp.stack([jnp.cos(x[0]), jnp.sin(x[0])])
    images = jax.jit(lambda batch: operator.apply(waves, batch))(batch)
    assert all(np.isfinite(image).all() for image in images)
