"""What is chosen where nothing is: networks, proposals, and the operators of the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import __main__ as cli
from lowrank_optax import spectral as s
from lowrank_optax.demo import problems, spectrum
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
    features = s.networks.default(operator, 2).features.clone(waves=4)
    smooth = lambda x: features.apply({}, x)
    kinked = lambda x: jnp.exp(-(x[0] ** 2)) * jnp.stack([jnp.ones(()), jnp.abs(x[0])])
    for function, low, high in ((kinked, 0.1, np.inf), (smooth, 0.0, 1e-4)):
        f, tf = jax.jit(lambda batch, g=function: operator.apply(g, batch))(batch)
        matrix = np.asarray(f.T @ tf)
        assert low <= abs(matrix - matrix.T).max() / abs(matrix).max() < high
    for features in (s.networks.ScaleFeatures(), s.networks.FourierFeatures(kink=True)):
        with pytest.raises(ValueError, match="kink=False"):
            s.fit(operator, s.networks.MLP(2, features=features))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: s.fit(ops.Koopman(np.ones((4, 2, 2)), np.ones((4, 2, 2))), 2), "not vectors"),
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
    got = problems.energies(lambda x: x[0] ** 2, 6, half_width=8.0, points=120)
    np.testing.assert_allclose(got, [1, 3, 5, 7, 9, 11], rtol=1e-10)


@pytest.mark.parametrize("name", problems.OPERATORS)
def test_truths_are_descending_and_applied_operators_finite(name):
    problem = problems.OPERATORS[name]()
    truth = problem.truth(3)
    assert (np.diff(truth) <= 1e-12).all() and (truth > 0).all()
    operator = problem.operator
    batch = operator.sample(jax.random.key(0), 16, operator.init())
    waves = lambda x: jnp.stack([jnp.cos(x[0]), jnp.sin(x[0])])
    images = jax.jit(lambda batch: operator.apply(waves, batch))(batch)
    assert all(np.isfinite(image).all() for image in images)


def test_options_of_every_method_are_a_fits():
    operator = problems.OPERATORS["oscillator1d"]().operator
    for name, options in problems.METHODS.items():
        found = options(operator, 3, 100)
        assert isinstance(found["method"], s.Method), name
    many = problems.METHODS["energy"](operator, 3, 100)
    assert many["network"].shared and many["network"].modes == 3


def test_ctrl_c_keeps_the_last_evaluation(tmp_path, capsys, monkeypatch):
    shown = []

    def show(record):
        shown.append(record)
        if len(shown) == 2:
            raise KeyboardInterrupt
        return "one"

    monkeypatch.setattr(spectrum, "_line", show)
    # The sizes of the command's own test, for what is compiled to be there already.
    sizes = ["--modes", "1", "--steps", "200", "--batch", "64", "--seed", "3"]
    arguments = ["spectrum", "--operator", "oscillator1d", *sizes, "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    assert "Stopped early" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["complete"] is False and len(result["history"]) == 2
    assert result["modes"][0]["eigenvalue"] == pytest.approx(shown[1]["eigenvalues"][0], rel=1e-5)
