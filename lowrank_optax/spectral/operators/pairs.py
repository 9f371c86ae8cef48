"""Operators that are known through pairs: transitions, edges, two views of the same thing."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_count, check_least
from lowrank_optax.spectral.operators._operator import (
    Function,
    Operator,
    check_rows,
    with_constant,
)


def lagged_pairs(trajectories: Any, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs ``(x_t, x_{t+lag})`` of one trajectory ``(n, ...)`` or a list of them.

    Args:
      trajectories: an array whose first axis is time, or a list of such.
      lag: in steps.

    Raises:
      ValueError: for a lag below 1, or one that no trajectory is long enough for.

    Example:
      >>> from lowrank_optax import spectral
      >>> x, y = spectral.operators.lagged_pairs([[0, 1, 2], [5, 6]], 1)
      >>> print(x, y)
      [0 1 5] [1 2 6]
    """
    check_count("lagged_pairs", "lag", lag)
    many = trajectories if isinstance(trajectories, list | tuple) else [trajectories]
    many = [np.asarray(t) for t in many if len(t) > lag]
    check(many, f"lagged_pairs: no trajectory is longer than the lag {lag}; pass a smaller one.")
    return np.concatenate([t[:-lag] for t in many]), np.concatenate([t[lag:] for t in many])


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs(Operator):
    """Pairs ``(x_i, y_i)`` of equal weight; ``constant`` prepends a mode that is 1 everywhere."""

    x: Any
    y: Any
    constant: bool = False
    exact: ClassVar[bool] = False

    def __post_init__(self):
        owner = type(self).__name__
        for name in ("x", "y"):
            value = getattr(self, name)
            object.__setattr__(self, name, check_rows(owner, name, value, np.ndim(value)))
        check(
            jnp.ndim(self.x) >= 1 and len(self.x) == len(self.y),
            f"{owner}: {len(self.x)} and {len(self.y)} rows came; pass as many y as x.",
        )

    def sample(self, key: jax.Array, size: int, state: Any = None) -> tuple[jax.Array, jax.Array]:
        """``size`` pairs drawn at random, or all in random order where there are no more."""
        count = len(self.x)
        if size >= count:
            at = jax.random.permutation(key, count)
        else:
            at = jax.random.randint(key, (size,), 0, count)
        return self.x[at], self.y[at]

    def dress(self, function: Function) -> Function:
        return with_constant(function) if self.constant else function


@dataclasses.dataclass(frozen=True, eq=False)
class CanonicalDependence(_Pairs):
    r"""The canonical dependence kernel of paired samples: the conditional mean operator.

    .. math:: (T g)(x) = E[g(Y) | x], \qquad (T^* f)(y) = E[f(X) | y]

    Singular values are the canonical correlations, the first 1 with constant functions. With pairs
    ``(x_t, x_{t+lag})`` it is the Koopman operator of a process that need not be reversible.

    Args:
      x: ``(n, ...)``.
      y: ``(n, ...)``, of any shape of its own.
      constant: prepend the constant mode, so that a network learns what comes after it.

    Raises:
      ValueError: for different numbers of rows, or entries that are not finite.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.
    """

    sides: ClassVar[int] = 2
    constant: bool = True

    def points(self, batch: Any) -> tuple[Any, ...]:
        return batch

    def apply(self, f: Function, g: Function, batch: Any) -> tuple[jax.Array, ...]:
        fx = jax.vmap(self.dress(f))(batch[0])
        gy = jax.vmap(self.dress(g))(batch[1])
        return fx, gy, gy, fx


@dataclasses.dataclass(frozen=True, eq=False)
class Koopman(_Pairs):
    r"""The transfer operator of a reversible process, from pairs ``(x_t, x_{t+lag})``.

    .. math:: (T f)(x) = E[f(x_{t+\tau}) | x_t = x]

    Every pair is used in both directions, which makes the estimate self-adjoint; for a process
    that is not reversible take `CanonicalDependence`. Build the pairs with `lagged_pairs`.

    Args:
      x: ``(n, ...)`` states.
      y: ``(n, ...)`` states a lag later.
      constant: prepend the constant mode, whose eigenvalue is 1.

    Raises:
      ValueError: for different numbers of rows, or entries that are not finite.

    Source: Wu and Noé, "Variational approach for learning Markov processes from time series data",
    2020.
    """

    group: ClassVar[int] = 2
    constant: bool = True

    def points(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0],)

    def apply(self, function: Function, batch: Any) -> tuple[jax.Array, jax.Array]:
        value = jax.vmap(self.dress(function))
        # Rows i and B + i are one pair; interleaved, so that halves of a batch are independent.
        f = jnp.stack([value(batch[0]), value(batch[1])], 1)
        swapped = f[:, ::-1]
        return f.reshape(-1, f.shape[-1]), swapped.reshape(-1, f.shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class GraphLaplacian(Operator):
    r"""``T = shift - L`` with ``L = I - D^{-1} W`` the random-walk Laplacian of a weighted graph.

    .. math:: \langle f, L f\rangle = \tfrac12 E_{(u,v)} (f(u) - f(v))^2

    with edges drawn by weight and read in both directions, and nodes by degree; so transitions of
    a reversible walk serve as edges.

    Args:
      edges: ``(E, 2, ...)`` pairs of nodes, as indices or as features.
      weights: ``(E,)`` positive, or ones.
      shift: added to the spectrum: with 1 ``T`` is the walk itself, with 0 minus the Laplacian.
      constant: prepend the constant mode, whose eigenvalue is ``shift``.
      everything: make every batch all edges once, weighed; as for `Matrix`.

    Raises:
      ValueError: for edges that are not pairs, or weights that are not positive.

    Source: Wu, Tucker and Nachum, "The Laplacian in RL", ICLR 2019.
    """

    edges: Any
    weights: Any = None
    shift: float = 1.0
    constant: bool = False
    everything: bool = False
    group: ClassVar[int] = 2
    exact: ClassVar[bool] = False

    def __post_init__(self):
        edges = check_rows("GraphLaplacian", "edges", self.edges, np.ndim(self.edges))
        check(
            edges.ndim >= 2 and edges.shape[1] == 2,
            f"GraphLaplacian: edges has shape {edges.shape}; pass (E, 2) nodes.",
        )
        weights = jnp.ones(len(edges)) if self.weights is None else self.weights
        weights = check_rows("GraphLaplacian", "weights", weights, 1)
        check(
            len(weights) == len(edges) and bool(jnp.all(weights > 0)),
            f"GraphLaplacian: weights of shape {weights.shape} came for {len(edges)} edges; pass "
            "a positive number for each.",
        )
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "weights", weights / jnp.sum(weights))

    def sample(self, key: jax.Array, size: int, state: Any = None) -> tuple[jax.Array, jax.Array]:
        """Edges drawn by weight, or all of them."""
        count = len(self.edges)
        if self.everything:
            return self.edges, self.weights * count
        at = jax.random.choice(key, count, (size,), p=self.weights)
        return self.edges[at], jnp.ones(size)

    def points(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0][:, 0],)

    def dress(self, function: Function) -> Function:
        return with_constant(function) if self.constant else function

    def apply(self, function: Function, batch: Any) -> tuple[jax.Array, jax.Array]:
        edges, weights = batch
        f = jax.vmap(jax.vmap(self.dress(function)))(edges)
        f = jnp.sqrt(weights)[:, None, None] * f
        tf = self.shift * f - (f - f[:, ::-1])
        return f.reshape(-1, f.shape[-1]), tf.reshape(-1, f.shape[-1])

    def truth(self, k: int) -> np.ndarray:
        """The ``k`` largest eigenvalues, dense, of a graph whose nodes are indices."""
        edges, weights = np.asarray(self.edges), np.asarray(self.weights, np.float64)
        check(edges.ndim == 2, "truth: nodes are features; only indices can be counted.")
        w = np.zeros((edges.max() + 1,) * 2)
        np.add.at(w, tuple(edges.T), weights)
        w = w + w.T
        degree = w.sum(0)
        root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
        live = degree > 0
        walk = (root[:, None] * w * root)[np.ix_(live, live)]
        return self.shift - 1 + np.linalg.eigvalsh(walk)[::-1][:k]


def timescales(eigenvalues: Any, lag: float) -> np.ndarray:
    r"""Implied time scales ``-lag / ln lam`` of a transfer operator's eigenvalues.

    Args:
      eigenvalues: ``(L,)``.
      lag: in whatever unit the time scales are wanted.

    Returns:
      ``(L,)``; infinite at and above 1, ``nan`` at and below 0, where there is none.

    Raises:
      ValueError: for a lag that is not positive.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> print(spectral.operators.timescales([1.0, np.exp(-0.5), -0.1], lag=1))
      [inf  2. nan]
    """
    check_least("timescales", "lag", lag, strict=True)
    lam = np.asarray(eigenvalues, np.float64)
    inside = (lam > 0) & (lam < 1)
    times = -lag / np.log(np.where(inside, lam, 0.5))
    return np.where(inside, times, np.where(lam >= 1, np.inf, np.nan))
