"""Operators that are known through pairs: transitions, edges, or two views of the same thing."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_count, check_least
from lowrank_optax.spectral.operators._operator import (
    Function,
    SampledOperator,
    blocks,
    check_held_out,
    check_rows,
    held_rows,
    with_constant,
)


def lagged_pairs(trajectories: Any, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs ``(x_t, x_{t+lag})`` of one trajectory ``(n, ...)`` or of a list of them.

    Args:
      trajectories: an array whose first axis is time, or a list of such arrays.
      lag: the distance in time of a pair, a number of steps.

    Returns:
      The states ``x`` and the later states ``y``, two arrays with a row for each pair.

    Raises:
      ValueError: for a lag below 1, or one that no trajectory is long enough for.

    Cost: a copy of the trajectories for each of the two arrays.

    Example:
      >>> from lowrank_optax import spectral
      >>> x, y = spectral.operators.lagged_pairs([[0, 1, 2], [5, 6]], 1)
      >>> print(x, y)
      [0 1 5] [1 2 6]

    Source: elementary.
    """
    check_count("lagged_pairs", "lag", lag)
    many = trajectories if isinstance(trajectories, list | tuple) else [trajectories]
    many = [np.asarray(t) for t in many if len(t) > lag]
    check(many, f"lagged_pairs: no trajectory is longer than the lag {lag}; pass a smaller one.")
    return np.concatenate([t[:-lag] for t in many]), np.concatenate([t[lag:] for t in many])


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs(SampledOperator):
    """Pairs ``(x_i, y_i)`` of equal weight; ``constant`` prepends a mode that is 1 everywhere."""

    x: Any
    y: Any
    constant: bool = False
    groups: Any = None
    held_out_part: float = 0.2
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
        check_held_out(owner, self)

    @classmethod
    def from_trajectories(cls, trajectories: Any, lag: int, **options: Any):
        """All pairs ``(x_t, x_{t+lag})``, of which whole trajectories are held out.

        Args:
          trajectories: an array whose first axis is time, or a list of such arrays; of a single one
            whole pieces are held out.
          lag: the distance in time of a pair, a number of steps.
          options: the other arguments of the operator, by name.

        Returns:
          The operator.

        Raises:
          ValueError: for a lag below 1, or one that no trajectory is long enough for.
        """
        x, y = lagged_pairs(trajectories, lag)
        many = trajectories if isinstance(trajectories, list | tuple) else [trajectories]
        counts = [max(0, len(t) - lag) for t in many]
        # A few long trajectories are cut into pieces, so that what is held out is near its part.
        groups = np.repeat(np.arange(len(many)), counts) if sum(map(bool, counts)) >= 5 else None
        return cls(x, y, groups=groups, **options)

    @property
    def rows(self) -> int:
        """The number of pairs."""
        return len(self.x)

    @property
    def indices(self) -> tuple[int, ...] | None:
        whole = lambda a: a.ndim == 1 and jnp.issubdtype(a.dtype, jnp.integer)
        if not (whole(self.x) and whole(self.y)):
            return None
        sizes = (int(jnp.max(self.x)) + 1, int(jnp.max(self.y)) + 1)
        return sizes if self.sides == 2 else (max(sizes),)

    def held_out(self) -> tuple["_Pairs", Any]:
        rows, held = held_rows(self.rows, self.held_out_part, self.groups)
        at = blocks(held if len(held) else rows)
        batches = self.x[at], self.y[at]
        if not len(held):
            return self, batches
        left = {"x": self.x[rows], "y": self.y[rows], "groups": None, "held_out_part": 0.0}
        return dataclasses.replace(self, **left), batches

    def sample(self, key: jax.Array, size: int, state: Any = None) -> tuple[jax.Array, jax.Array]:
        """``size`` pairs drawn at random, or a permutation of all where there are no more."""
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

    Singular values are the canonical correlations; the first is 1, with constant functions. With
    pairs ``(x_t, x_{t+lag})`` it is the Koopman operator of a process that need not be reversible.

    Args:
      x: the first sample of every pair, ``(n, ...)``.
      y: the second sample of every pair, ``(n, ...)``, whose other axes may differ from those of
        ``x``.
      constant: whether the constant mode is prepended, so that a network learns what comes after
        it; ``True`` by default.
      groups: the number of the trajectory that each pair comes from, ``(n,)``, by which they are
        held out; by default, ``None``, a twentieth of the rows in their order is a group.
      held_out_part: the part of the groups that the fit does not learn from and is read from, in
        [0, 1), 0.2 by default; with 0, and with fewer than 20 rows, it is read from the same rows.

    Raises:
      ValueError: for different numbers of rows, or entries that are not finite.

    Cost: ``B`` evaluations of the network on each side.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> x, y = jnp.array([0.0, 1.0]), jnp.array([5.0, 7.0])
      >>> operator = spectral.operators.CanonicalDependence(x, y)
      >>> f, image, _, _ = operator.apply(lambda x: x[None], lambda y: y[None], (x, y))
      >>> print(image)  # the constant, and at x a sample of E[Y | x]
      [[1. 5.]
       [1. 7.]]
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

    Every pair is used in both directions, which makes the estimate self-adjoint. For a process that
    is not reversible use `CanonicalDependence`. `lagged_pairs` makes the pairs.

    Args:
      x: the states, ``(n, ...)``.
      y: the states a lag later, ``(n, ...)``.
      constant: whether the constant mode, whose eigenvalue is 1, is prepended; ``True`` by default.
      groups: the number of the trajectory that each pair comes from, as in `CanonicalDependence`;
        ``Koopman.from_trajectories`` knows it.
      held_out_part: the part that the fit is read from, as in `CanonicalDependence`.

    Raises:
      ValueError: for different numbers of rows, or entries that are not finite.

    Cost: ``2 B`` evaluations of the network for ``B`` pairs.

    Source: Wu and Noé, "Variational approach for learning Markov processes from time series data",
    2020.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> x, y = jnp.array([0.0, 1.0]), jnp.array([5.0, 7.0])
      >>> operator = spectral.operators.Koopman(x, y, constant=False)
      >>> f, image = operator.apply(lambda x: x[None], (x, y))
      >>> print(f[:, 0], image[:, 0])
      [0. 5. 1. 7.] [5. 0. 7. 1.]
    """

    group: ClassVar[int] = 2
    constant: bool = True

    def points(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0],)

    def apply(self, function: Function, batch: Any) -> tuple[jax.Array, jax.Array]:
        value = jax.vmap(self.dress(function))
        # The rows of a pair lie next to each other, so that halves of a batch are independent.
        f = jnp.stack([value(batch[0]), value(batch[1])], 1)
        swapped = f[:, ::-1]
        return f.reshape(-1, f.shape[-1]), swapped.reshape(-1, f.shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class GraphLaplacian(SampledOperator):
    r"""A weighted graph's random walk, ``T = shift - L`` with the Laplacian ``L = I - D^{-1} W``.

    .. math:: \langle f, L f\rangle = \tfrac12 E_{(u,v)} (f(u) - f(v))^2

    with edges drawn by weight and read in both directions, and nodes by degree, so that transitions
    of a reversible walk serve as edges.

    Args:
      edges: pairs of nodes, ``(E, 2, ...)``, as indices or as features.
      weights: the edges' weights, ``(E,)`` and positive; ones by default.
      shift: number added to the spectrum, 1 by default: with 1 ``T`` is the walk itself, with 0
        minus the Laplacian.
      constant: whether the constant mode, whose eigenvalue is ``shift``, is prepended; ``False`` by
        default.
      everything: whether every batch holds all edges once, weighed, as for `Matrix`; ``False`` by
        default. Nodes that are features are samples: a fifth of their edges is held out of the fit,
        which is read from them, unless a batch is everything.

    Raises:
      ValueError: for edges that are not pairs, or weights that are not positive.

    Cost: ``2 B`` evaluations of the network for ``B`` edges.

    Source: Wu, Tucker and Nachum, "The Laplacian in RL", ICLR 2019.

    Example:
      >>> from lowrank_optax import spectral
      >>> triangle = spectral.operators.GraphLaplacian([[0, 1], [1, 2], [2, 0]])
      >>> print(triangle.truth(3).round(3))
      [ 1.  -0.5 -0.5]
    """

    edges: Any
    weights: Any = None
    shift: float = 1.0
    constant: bool = False
    everything: bool = False
    nodes: int | None = dataclasses.field(init=False, default=None)
    group: ClassVar[int] = 2

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
        if edges.ndim == 2 and jnp.issubdtype(edges.dtype, jnp.integer):
            object.__setattr__(self, "nodes", int(jnp.max(edges)) + 1)

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a batch is all nodes with all of their edges."""
        return self.everything and self.nodes is not None

    @property
    def indices(self) -> tuple[int, ...] | None:
        return None if self.nodes is None else (self.nodes,)

    def held_out(self) -> tuple["GraphLaplacian", Any]:
        if self.nodes is not None:  # a graph that is given whole is no sample of another one
            batch = jax.tree.map(lambda a: a[None], self.sample(jax.random.key(0), 0))
            return self, batch if self.everything else None
        rows, held = held_rows(len(self.edges), 0.0 if self.everything else 0.2, None)
        at = blocks(held if len(held) else rows)
        batches = self.edges[at], self.weights[at] * len(self.edges)
        if not len(held):
            return self, batches
        left = {"edges": self.edges[rows], "weights": self.weights[rows]}
        return dataclasses.replace(self, **left), batches

    def sample(self, key: jax.Array, size: int, state: Any = None) -> tuple[jax.Array, jax.Array]:
        """Edges drawn by weight, or all of them with ``everything``."""
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
        if self.exact:
            return self._at_nodes(function, edges, weights / len(edges))
        f = jax.vmap(jax.vmap(self.dress(function)))(edges)
        f = jnp.sqrt(weights)[:, None, None] * f
        tf = self.shift * f - (f - f[:, ::-1])
        return f.reshape(-1, f.shape[-1]), tf.reshape(-1, f.shape[-1])

    def _at_nodes(self, function: Function, edges: jax.Array, w: jax.Array) -> Any:
        """``f`` and ``T f`` at every node, times the root of its share of the edges' ends."""
        f = jax.vmap(self.dress(function))(jnp.arange(self.nodes))
        one, two = edges[:, 0], edges[:, 1]
        at = lambda values, to: jax.ops.segment_sum(values, to, self.nodes)
        degree = at(w, one) + at(w, two)
        inflow = at(w[:, None] * f[two], one) + at(w[:, None] * f[one], two)
        walk = inflow / jnp.where(degree > 0, degree, 1)[:, None]
        root = jnp.sqrt(degree * (len(f) / 2))[:, None]
        return root * f, root * ((self.shift - 1) * f + walk)

    def truth(self, k: int) -> np.ndarray:
        """The ``k`` largest eigenvalues, descending, of a graph whose nodes are indices.

        Raises:
          ValueError: where the nodes are features.

        Cost: memory ``n²`` and ``4/3 n³`` flops for ``n`` nodes.
        """
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
    """Implied time scales ``-lag / ln lam`` of a transfer operator's eigenvalues.

    Args:
      eigenvalues: eigenvalues of the operator, ``(L,)``.
      lag: the lag between the states of a pair, in the unit that the time scales shall have.

    Returns:
      The time scales, ``(L,)``; infinite for eigenvalues at and above 1, ``nan`` at and below 0,
      where there is none.

    Raises:
      ValueError: for a lag that is not positive.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> print(spectral.operators.timescales([1.0, np.exp(-0.5), -0.1], lag=1))
      [inf  2. nan]

    Source: elementary.
    """
    check_least("timescales", "lag", lag, strict=True)
    lam = np.asarray(eigenvalues, np.float64)
    inside = (lam > 0) & (lam < 1)
    times = -lag / np.log(np.where(inside, lam, 0.5))
    return np.where(inside, times, np.where(lam >= 1, np.inf, np.nan))
