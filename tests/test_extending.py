"""Parts written outside the package, with public names alone, keep the same contract as ours."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside
import pytest
from cases import BASES, CURVATURES, INNERS
from test_contract import keep_the_contract
from test_optax_contract import _case, _common_test

import lowrank_optax as lro

MEASURED, KEPT, INSIDE = outside.WithPrevious(), outside.OneDirection(), outside.HeavyBall()


def test_only_public_names_are_used():
    tree = ast.parse(Path(outside.__file__).read_text())
    names = [x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute)]
    names += [x.name for x in ast.walk(tree) if isinstance(x, ast.alias)]
    assert not [name for name in names if name.startswith("_") or "._" in name]


@pytest.mark.parametrize(
    "parts",
    [
        (MEASURED, KEPT, INSIDE),
        (MEASURED, BASES["eigen"], INNERS["default"]),
        (CURVATURES["covariance"], KEPT, INNERS["adam"]),
        (CURVATURES["fisher"], KEPT, INNERS["default"]),
        (CURVATURES["covariance"], BASES["ggt"], INSIDE),
        (CURVATURES["covariance"], BASES["full"], (INSIDE, lro.inner.Cautious())),
    ],
    ids=lambda parts: "-".join(type(p).__name__ for p in parts),
)
def test_parts_from_outside_keep_the_contract(parts):
    keep_the_contract(*parts)


CASES = (_case(learning_rate=3e-4, curvature=MEASURED, basis=KEPT, inner=INSIDE),)


class ContribTest(_common_test("outside", CASES)):
    """optax's suite of contributed optimizers."""


def test_a_curvature_from_outside_is_what_it_says(x64):
    """With a basis that sums everything: each gradient once as itself, once as the previous."""
    grads = np.random.default_rng(0).normal(size=(4, 5))
    tx = lro.scale_by_lre(MEASURED, lro.basis.FullMatrix(None), lro.inner.LInv())
    state = tx.init(jnp.zeros(5))
    for g in grads:
        updates, state = tx.update(jnp.asarray(g), state)
    b = np.eye(5) + sum(np.outer(g, g) for g in grads) + sum(np.outer(g, g) for g in grads[:-1])
    np.testing.assert_allclose(updates, np.linalg.solve(b, grads[-1]), rtol=1e-9)


def test_a_basis_and_a_part_from_outside_are_what_they_say(x64):
    """One direction: the gradient's own, along which the momentum is carried by a cosine."""
    grads = np.random.default_rng(1).normal(size=(5, 4))
    tx = lro.scale_by_lre(lro.curvature.Covariance(), KEPT, INSIDE)
    state, m, q = tx.init(jnp.zeros(4)), 0.0, np.zeros(4)
    for g in grads:
        updates, state = tx.update(jnp.asarray(g), state)
        new = g / np.linalg.norm(g)
        m = 0.9 * (new @ q) * m + new @ g
        q = new
        np.testing.assert_allclose(updates, m * q, rtol=1e-9)
    np.testing.assert_allclose(state.basis.lam[0, 0], grads[-1] @ grads[-1], rtol=1e-12)


def test_a_basis_from_outside_is_a_side_of_a_matrix():
    tx = optax.chain(lro.scale_by_matrix_lre(KEPT, None, INSIDE), optax.scale(-0.1))
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert all(np.all(np.isfinite(u)) and np.any(u) for u in jax.tree.leaves(updates))
    assert int(state[0].matrices["3x4"].steps[0]) == 1


def spiked(count, d=12, seed=0):
    """A stream with energy 9 and 4 along the first two axes, and .01 along the others."""
    scales = jnp.full(d, 0.1).at[:2].set(jnp.array([3.0, 2.0]))
    return jax.random.normal(jax.random.key(seed), (count, d)) * scales


def leading(operator):
    """The share of the first two axes in the eigenvectors."""
    return float(jnp.sum(operator.eigenvectors()[:, :2] ** 2)) / 2


def test_a_tracker_from_outside_follows_the_leading_directions():
    """Compiled, with vectors that are not finite, and resumed from what it found."""
    tracker, vectors = outside.SubspaceRule(2), spiked(600).at[7].set(jnp.nan)
    state = jax.jit(tracker.update)(tracker.init(jax.random.key(1), vectors[0]), vectors)
    assert int(state.seen) == 599 and int(state.skipped) == 1
    found = tracker.operator(state)
    assert leading(found) > 0.99
    np.testing.assert_allclose(found.eigenvalues(), [9, 4], rtol=0.25)
    again = tracker.operator(tracker.resume(found, 599))
    np.testing.assert_allclose(again.eigenvalues(), found.eigenvalues(), rtol=1e-4)


def test_a_purpose_from_outside_has_the_gradient_that_it_says(x64):
    """Against the derivative of its loss, and a learner with it alone finds the subspace."""
    vectors = spiked(8).astype(jnp.float64)
    weights = jnp.full(8, 1 / 8)

    def view(a):
        layout = lro.Layout.of(vectors[0], None)
        operator = lro.online.Operator(a, jnp.eye(2), a @ a.T, layout)
        stream = lro.online.Stream([vectors], weights)
        return lro.online.View(operator, stream, vectors @ a.T, None, {}, jnp.asarray(2.0), ())

    a = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12)))
    terms = outside.Capture().terms(view(a), ())
    gradient = terms.left.T @ terms.right[0]
    want = jax.grad(lambda a: outside.Capture().terms(view(a), ()).value)(a)
    np.testing.assert_allclose(gradient, want, rtol=1e-10)
    np.testing.assert_allclose(terms.inside, vectors @ a.T, rtol=1e-12)


def test_a_learner_with_a_purpose_from_outside():
    learner = lro.online.learner(2, (outside.Capture(),), optax.adam(3e-2), reconstruction=0.0)
    batches = spiked(1600).reshape(200, 8, 12)
    step = lambda state, batch: (learner.update(state, batch)[0], None)
    state, _ = jax.lax.scan(step, learner.init(jax.random.key(0), batches[0, 0]), batches)
    assert leading(learner.operator(state)) > 0.99


def test_an_operator_from_outside_is_decomposed():
    """Its eigenvalues are ``cos(k h)``: 1 and twice ``cos(h)`` are the largest."""
    features = lambda x: jnp.array([1.0, jnp.cos(x), jnp.sin(x), jnp.cos(2 * x), jnp.sin(2 * x)])
    network = lro.spectral.Network(
        lambda key, x: jax.random.normal(key, (3, 5)) / 3, lambda p, x: p @ features(x)
    )
    found = lro.spectral.fit(outside.Neighbours(), network, optimizer=optax.adam(3e-2), steps=600)
    np.testing.assert_allclose(found.eigenvalues, [1, np.cos(0.5), np.cos(0.5)], atol=0.03)


def test_the_guide_shows_this_code():
    """Every Python block of the guide that defines something is in `outside.py`, word for word."""
    guide = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    source = Path(outside.__file__).read_text()
    blocks = [text.split("```")[0].strip() for text in guide.split("```python\n")[1:]]
    shown = [block for block in blocks if "class " in block]
    assert len(shown) == 3 and all(block in source for block in shown)
