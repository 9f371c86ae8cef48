"""What a subspace is learnt for: losses over codes, with closed-form gradients.

Every loss is an average over the vectors ``v`` of a batch, with codes ``z = A v``. Its gradient is
a sum of outer products ``sum_j a_j b_j^T``, ``a_j`` in the space of codes, ``b_j`` in that of
vectors, so that a purpose costs a few passes over ``A``. The average energy ``E = E‖v‖²`` of the
stream makes losses free of units.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_least
from lowrank_optax._core.precision import callers_precision
from lowrank_optax._core.types import Columns
from lowrank_optax.online.operator import Operator

Weight = float | Callable[[jax.Array], jax.Array]
"""A number, or a schedule: a function of the number of updates."""


class Stream(NamedTuple):
    """Vectors of one kind in one batch.

    Attributes:
      columns: ``(k, leaf.size)`` for every leaf, zero where a vector was not finite.
      weights: ``(k,)``, equal for all finite vectors, with sum one, or zero if there are none.
    """

    columns: Columns
    weights: jax.Array


class Pairs(NamedTuple):
    """Vectors and what follows each.

    Attributes:
      sources: the vectors.
      codes: ``(k, r)``, theirs.
      targets: what follows, with a weight for each pair.
    """

    sources: Columns
    codes: jax.Array
    targets: Stream


class Batch(NamedTuple):
    """What a purpose of the user's own sees of the stream.

    Attributes:
      vectors: shaped like the example, with a leading axis ``k``; zero where not finite.
      weights: ``(k,)``, with sum one; zero for vectors that were skipped.
      extra: what else was passed to ``update``, shaped like ``vectors``, by name.
    """

    vectors: Any
    weights: jax.Array
    extra: dict[str, Any]


class View(NamedTuple):
    """What a purpose sees of the state and one batch.

    Attributes:
      operator: as it was before the batch, ``H`` included: an average over other vectors, so that
        gradients through ``H`` are nearly without bias.
      stream: the batch.
      codes: ``(k, r)`` of the batch.
      pairs: vectors and their successors, for purposes that ask for them.
      extra: other streams by name.
      energy: ``E‖v‖²``, or one.
      memory: of this purpose.
    """

    operator: Operator
    stream: Stream
    codes: jax.Array
    pairs: Pairs | None
    extra: dict[str, Stream]
    energy: jax.Array
    memory: Any


class Terms(NamedTuple):
    """A loss and its gradient in factors.

    Attributes:
      value: the loss.
      left: ``(j, r)``, the ``a_j``.
      right: the ``b_j``, ``(j, leaf.size)`` for every leaf.
      inside: ``(j, r)``, their codes ``A b_j``.
      theta: the gradient of the purpose's own parameters.
      dense: a gradient that is not a sum of few products, ``(r, leaf.size)`` for every leaf.
    """

    value: jax.Array
    left: jax.Array | None = None
    right: Columns | None = None
    inside: jax.Array | None = None
    theta: Any = ()
    dense: Columns | None = None


@dataclasses.dataclass(frozen=True)
class Purpose(abc.ABC):
    """A term of the composite loss, ``weight`` times `terms`.

    ``free`` purposes need rows of any length, ``pairs`` are shown successors.
    """

    weight: Weight = 1.0
    free: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    def __post_init__(self):
        if not callable(self.weight):
            check_least(type(self).__name__, "weight", self.weight)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that ``update`` has to be given besides the main one."""
        name = getattr(self, "stream", None)
        return () if name is None else (name,)

    def theta(self, key: jax.Array, rank: int, dtype: Any) -> Any:
        """The parameters that the purpose learns besides ``A``."""
        return ()

    def memory(self, rank: int, dtype: Any) -> Any:
        """What the purpose remembers of the stream, before it began."""
        return ()

    def remember(self, memory: Any, view: View, rate: jax.Array) -> Any:
        """The memory with a batch blended in at a rate."""
        return memory

    def move(self, memory: Any, c: jax.Array) -> Any:
        """The memory after codes have moved by ``C``."""
        return memory

    @abc.abstractmethod
    def terms(self, view: View, theta: Any) -> Terms:
        """The loss and its factors."""


@dataclasses.dataclass(frozen=True)
class Reconstruction(Purpose):
    r"""Energy that the subspace loses: the purpose that PCA has.

    .. math:: L = E‖v - A^T A v‖^2 / E, \qquad
              \partial A = -2 (z \rho^T + (A\rho) v^T) / E, \quad \rho = v - A^T z

    Its minimum is the leading eigenspace with orthonormal rows. Anchoring another purpose with it
    can kill that: for dynamics below a critical weight reconstruction wins and nothing is learnt.

    Args:
      weight: its share of the loss, a number or a schedule.
      stream: name of the extra stream it looks at; by default the main one.

    Raises:
      ValueError: for a negative weight.

    Cost: ``8 k r d`` flops.

    Source: Oja, "Neural networks, principal components, and subspaces", 1989.
    """

    stream: str | None = None

    def terms(self, view: View, theta: Any) -> Terms:
        stream, codes = _of(view, self.stream)
        rho = _less(stream.columns, view.operator.columns(codes))
        value = jnp.sum(stream.weights * view.operator.layout.squares(rho))
        cotangent = _scaled(rho, -2 * stream.weights / view.energy)
        return Terms(value / view.energy, *_through(view, stream.columns, codes, cotangent))


@dataclasses.dataclass(frozen=True)
class OldTask(Reconstruction):
    r"""Old-task relevance: the subspace is to hold the vectors ``u`` on which old tasks depend.

    `Reconstruction` of a stream of its own, ``update(state, v, old=u)``: per-example Jacobians of
    old outputs, or the activations that fed an old layer. Added to the reconstruction of the main
    stream its optimum with orthonormal rows is the leading eigenspace of ``C + weight F``, with
    ``F = E u u^T``, which `signed_pca` gives in closed form.

    Args:
      weight: its share of the loss, a number or a schedule.
      stream: the name under which the vectors are passed.

    Source: Saha, Garg and Roy, "Gradient projection memory for continual learning", ICLR 2021.
    """

    stream: str | None = "old"


@dataclasses.dataclass(frozen=True)
class Avoidance(Purpose):
    r"""Energy of a second stream that gets in: directions the subspace is to avoid.

    .. math:: L = E‖A w‖^2 / E, \qquad \partial A = 2 (A w) w^T / E

    With orthonormal rows and `Reconstruction` its optimum is the leading eigenspace of ``C - weight
    E w w^T``, a signed covariance; see `signed_pca`.

    Args:
      weight: its share of the loss, a number or a schedule.
      stream: the name under which the vectors ``w`` are passed to ``update``.

    Cost: ``4 k r d`` flops.

    Source: Abid et al., "Exploring patterns enriched in a dataset with contrastive principal
    component analysis", Nature Communications 2018.
    """

    stream: str = "avoid"

    def terms(self, view: View, theta: Any) -> Terms:
        stream, codes = _of(view, self.stream)
        value = jnp.sum(stream.weights * jnp.sum(codes**2, axis=1)) / view.energy
        left = 2 / view.energy * stream.weights[:, None] * codes
        return Terms(value, left, stream.columns, codes)


@dataclasses.dataclass(frozen=True)
class Whitening(Purpose):
    r"""Codes of equal variance: ``H = E z z^T`` is to be a multiple of the identity.

    .. math:: L = r\,\mathrm{tr} H^2 / (\mathrm{tr} H)^2 - 1, \qquad \text{or} \qquad
              L = ‖H - \alpha I‖_F^2, \quad \alpha = \mathrm{tr} H / r

    with ``∂A = 2 (∂L/∂H) z v^T``, ``∂L/∂H = 2 (H - αI)`` for the second form. Together with
    reconstruction the optimum lies exactly in the leading eigenspace, with scales ``A Q =
    diag(√p_i)``, ``p_i = (1 + λα)/(1 + λ λ_i)`` for a weight ``λ`` of the second form: a damped
    inverse. It shapes the scaling and cannot better PCA's span; ``operator.power(v, -0.5)`` has
    the exact root. With orthonormal rows it would only discard the leading directions, which the
    learner refuses.

    Args:
      weight: its share of the loss, a number or a schedule.
      relative: the first form, free of units; else the second, in fourth powers of them.

    Cost: ``2 k r d`` flops.
    """

    relative: bool = True
    free: ClassVar[bool] = True

    def terms(self, view: View, theta: Any) -> Terms:
        h = view.operator.h
        r, trace, square = h.shape[0], jnp.trace(h), jnp.sum(h**2)
        eye = jnp.eye(r, dtype=h.dtype)
        if self.relative:
            value = linalg.safe_divide(r * square, trace**2) - (trace > 0)
            d = linalg.safe_divide(2 * r * (h - linalg.safe_divide(square, trace) * eye), trace**2)
        else:
            value = square - trace**2 / r
            d = 2 * (h - trace / r * eye)
        return Terms(value, *_moments(view, d))


@dataclasses.dataclass(frozen=True)
class Entropy(Purpose):
    r"""Von Neumann entropy of the codes' moments, against collapse.

    .. math:: L = \ln r + \mathrm{tr} \rho \ln \rho, \quad \rho = H / \mathrm{tr} H, \qquad
              \partial L / \partial H = (\ln\rho - (\mathrm{tr} \rho \ln\rho) I) / \mathrm{tr} H

    Zero for codes of equal variance, ``ln r`` where one direction has it all.

    Args:
      weight: its share of the loss, a number or a schedule.

    Cost: ``2 k r d + O(r³)`` flops.

    Source: Kim et al., "VNE: an effective method for improving deep representation by manipulating
    eigenvalue distribution", CVPR 2023.
    """

    def terms(self, view: View, theta: Any) -> Terms:
        h = view.operator.h
        r, trace = h.shape[0], jnp.trace(h)
        lam, v = linalg.eigh(linalg.symmetrize(linalg.safe_divide(h, trace)))
        # A logarithm bounded by what the dtype resolves: dead directions are drawn in, not thrown.
        log = jnp.log(jnp.maximum(lam, jnp.finfo(h.dtype).eps))
        negative = jnp.sum(jnp.maximum(lam, 0) * log)
        d = linalg.safe_divide((v.T * (log - negative)) @ v, trace)
        return Terms(jnp.where(trace > 0, jnp.log(float(r)) + negative, 0), *_moments(view, d))


class Lagged(NamedTuple):
    """Running moments of a sequence of codes.

    Attributes:
      past: ``(r, r)``, ``E z z^T`` of the sources.
      lag: ``(r, r)``, ``E z' z^T``.
    """

    past: jax.Array
    lag: jax.Array


@dataclasses.dataclass(frozen=True)
class Dynamics(Purpose):
    r"""The next vector is to be predicted from this one's code.

    .. math:: L = E‖v' - A^T f(z)‖^2 / E, \qquad
              \partial A = -2 (f(z) e^T + J_f^T (A e) v^T) / E, \quad e = v' - A^T f(z)

    By default ``f(z) = M z`` is the best linear map for the present ``A``, from running moments:
    ``M = S^{-1} E[z' z^T] E[z z^T]^{-1}``, so that there is nothing to tune. A flax module, or a
    pair ``(init, apply)``, learns any other ``f`` by the learner's optimizer, with gradient
    ``-2 J_θ^T A e / E``.

    Where nothing is predicted yet there is hardly a gradient: a direction is found from its fourth
    power in the loss. Batches of 50 vectors and more, rates like Adam's 0.03 that fall later, and a
    learner whose ``decay`` forgets ``M`` in a few updates find all of them sooner; an anchor should
    come after that, by a schedule.

    Vectors follow one another in the order in which they are passed, within a batch and across
    batches; or their successors are given, ``update(state, v, next=v')``.

    Args:
      weight: its share of the loss, a number or a schedule.
      f: ``None`` for the linear map, a flax module over one code ``(r,)``, or ``(init, apply)``
        with ``init(key, z) -> theta`` and ``apply(theta, z) -> (r,)``.
      ridge: added to ``E[z z^T]``, relative to its mean eigenvalue.

    Raises:
      ValueError: for a negative weight or ridge, or an ``f`` that is none of these.

    Cost: ``8 k r d`` flops, and one vector of memory.

    Source: Schmid, "Dynamic mode decomposition of numerical and experimental data", Journal of
    Fluid Mechanics 2010; with the subspace optimised, Wynn et al., "Optimal mode decomposition for
    unsteady flows", Journal of Fluid Mechanics 2013.
    """

    f: Any = None
    ridge: float = 1e-4
    pairs: ClassVar[bool] = True

    def __post_init__(self):
        Purpose.__post_init__(self)
        check_least("Dynamics", "ridge", self.ridge)
        pair = isinstance(self.f, tuple) and len(self.f) == 2 and all(map(callable, self.f))
        check(
            self.f is None or pair or (hasattr(self.f, "init") and hasattr(self.f, "apply")),
            f"Dynamics: f is {self.f!r}; pass None, a flax module or a pair (init, apply).",
        )

    def theta(self, key: jax.Array, rank: int, dtype: Any) -> Any:
        if self.f is None:
            return ()
        init = self.f[0] if isinstance(self.f, tuple) else self.f.init
        return init(key, jnp.zeros(rank, dtype))

    def memory(self, rank: int, dtype: Any) -> Lagged:
        return Lagged(jnp.zeros((rank, rank), dtype), jnp.zeros((rank, rank), dtype))

    def remember(self, memory: Lagged, view: View, rate: jax.Array) -> Lagged:
        pairs = _pairs(view)
        after = view.operator.codes(pairs.targets.columns)
        weighted = pairs.targets.weights[:, None] * pairs.codes
        some = rate * jnp.sum(pairs.targets.weights)
        blend = lambda old, new: (1 - some) * old + rate * new
        return Lagged(
            blend(memory.past, weighted.T @ pairs.codes), blend(memory.lag, after.T @ weighted)
        )

    def move(self, memory: Lagged, c: jax.Array) -> Lagged:
        return Lagged(c @ memory.past @ c.T, c @ memory.lag @ c.T)

    def linear(self, memory: Lagged, gram: jax.Array) -> jax.Array:
        """``M``, ``(r, r)``, the best linear map of codes for the moments."""
        r = gram.shape[0]
        ridge = self.ridge * jnp.trace(memory.past) / r
        shrunk = memory.past + jnp.where(ridge > 0, ridge, 1) * jnp.eye(r, dtype=gram.dtype)
        back = jnp.linalg.solve(shrunk, memory.lag.T).T
        return linalg.matrix_power(gram, -1.0, damping=0, rdamping=0) @ back

    def terms(self, view: View, theta: Any) -> Terms:
        pairs = _pairs(view)
        sources, codes, (targets, weights) = pairs
        if self.f is None:
            theta = self.linear(view.memory, view.operator.gram)
        fz, back = jax.vjp(self._predict, theta, codes)
        e = _less(targets, view.operator.columns(fz))
        value = jnp.sum(weights * view.operator.layout.squares(e)) / view.energy
        scale = -2 * weights / view.energy
        within = view.operator.codes(e)
        bar, before = back(scale[:, None] * within)
        left = jnp.concatenate([scale[:, None] * fz, before])
        right = [jnp.concatenate(pair) for pair in zip(e, sources, strict=True)]
        inside = jnp.concatenate([within, codes])
        return Terms(value, left, right, inside, () if self.f is None else bar)

    def _predict(self, theta: Any, codes: jax.Array) -> jax.Array:
        if self.f is None:
            return codes @ theta.T
        apply = self.f[1] if isinstance(self.f, tuple) else self.f.apply
        return jax.vmap(callers_precision(lambda z: apply(theta, z)))(codes)


@dataclasses.dataclass(frozen=True)
class EditLocality(Purpose):
    r"""Edit localisation: a rank-one edit of a linear layer is to spare all other inputs.

    To give the key ``k`` a new value, ``W <- W + (y - W k) k_⊥^T / (k_⊥^T k)`` with
    ``k_⊥ = k - A^T A k`` changes the outputs of other inputs ``x`` by what is left of them along
    ``k_⊥``. That is what is minimised, with ``C = E x x^T`` over the main stream:

    .. math:: L = E_k \frac{k_⊥^T C k_⊥}{(k_⊥^T k)^2}, \qquad
              \frac{\partial L}{\partial k_⊥} =
              \frac{2 C k_⊥}{s^2} - \frac{2 q}{s^3} k, \quad q = k_⊥^T C k_⊥, \; s = k_⊥^T k

    Args:
      weight: its share of the loss, a number or a schedule.
      stream: the name under which the keys are passed to ``update``.

    Cost: ``(8 r + 4 k) e d`` flops for ``e`` keys and ``k`` vectors.

    Source: Meng et al., "Locating and editing factual associations in GPT", NeurIPS 2022; Fang et
    al., "AlphaEdit: null-space constrained knowledge editing for language models", ICLR 2025.
    """

    stream: str = "edits"

    def terms(self, view: View, theta: Any) -> Terms:
        layout = view.operator.layout
        (keys, weights), codes = _of(view, self.stream)
        outside = _less(keys, view.operator.columns(codes))
        along = layout.dot(outside, view.stream.columns)[0]  # (e, k)
        q = jnp.sum(along**2 * view.stream.weights[None], axis=1)
        s = _inner(view, outside, keys)
        value = jnp.sum(weights * linalg.safe_divide(q, s**2))
        ck = layout.combine((along * view.stream.weights[None])[None], view.stream.columns)
        # The cotangent of A^T A k is that of k_⊥ with the other sign.
        one = -2 * weights * linalg.safe_divide(1.0, s**2)
        two = 2 * weights * linalg.safe_divide(q, s**3)
        cotangent = [a + b for a, b in zip(_scaled(ck, one), _scaled(keys, two), strict=True)]
        return Terms(value, *_through(view, keys, codes, cotangent))


@dataclasses.dataclass(frozen=True)
class Activation(Purpose):
    r"""Activation geometry: what comes after a bottleneck ``A^T A h`` is to say the same.

    .. math:: L = E\,\mathrm{KL}(\mathrm{softmax}\,\phi(h) \,‖\, \mathrm{softmax}\,\phi(A^T A h)),
              \qquad \partial A = z c^T + (A c) h^T, \quad c = \frac{\partial L}{\partial A^T A h}

    where ``φ``, the ``head``, is the rest of the network.

    Args:
      weight: its share of the loss, a number or a schedule.
      head: a function of one vector, shaped like the example, that returns logits ``(n,)``.

    Raises:
      ValueError: for a head that is not a function.

    Cost: ``8 k r d`` flops, and the head forward twice and backward once.

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, for the
    loss.
    """

    head: Any = None

    def __post_init__(self):
        Purpose.__post_init__(self)
        check(
            callable(self.head),
            f"Activation: head is {self.head!r}; pass a function of one vector that returns "
            "logits.",
        )

    def terms(self, view: View, theta: Any) -> Terms:
        layout, (columns, weights) = view.operator.layout, view.stream
        logits = lambda x: jax.vmap(callers_precision(self.head))(layout.vectors(x))
        target = jax.nn.log_softmax(logits(columns))

        def loss(x):
            gap = target - jax.nn.log_softmax(logits(x))
            return jnp.sum(weights * jnp.sum(jnp.exp(target) * gap, axis=-1))

        value, cotangent = jax.value_and_grad(loss)(view.operator.columns(view.codes))
        return Terms(value, *_through(view, columns, view.codes, cotangent))


@dataclasses.dataclass(frozen=True)
class Custom(Purpose):
    r"""A purpose of the user's own: any differentiable function of ``(operator, batch)``.

    It is differentiated through ``operator.encode`` and the rest; through ``operator.h`` as the
    average over the stream that it is, ``∂H = E[∂(z z^T)]``, not as one step of a running one.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> def sparse(operator, batch):
      ...     return jnp.mean(jnp.abs(operator.encode(batch.vectors)))
      >>> learner = lro.online.learner(4, purposes=(lro.online.Custom(0.1, sparse),))

    Args:
      weight: its share of the loss, a number or a schedule.
      function: ``(operator, batch) -> scalar``, see `Batch`; non-finite vectors come as zeros of
        weight zero.
      names: of the extra streams it needs, if any.

    Raises:
      ValueError: for something that is not a function.

    Cost: the function's, and ``4 r² d`` flops to keep its gradient tangent to orthonormal rows.
    """

    function: Any = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        Purpose.__post_init__(self)
        check(
            callable(self.function),
            f"Custom: function is {self.function!r}; pass a function of (operator, batch).",
        )

    @property
    def streams(self) -> tuple[str, ...]:
        return self.names

    def terms(self, view: View, theta: Any) -> Terms:
        old, layout = view.operator, view.operator.layout
        extra = {name: layout.vectors(s.columns) for name, s in view.extra.items()}
        batch = Batch(layout.vectors(view.stream.columns), view.stream.weights, extra)

        def through(constant: jax.Array, varying: jax.Array) -> jax.Array:
            return constant + varying - jax.lax.stop_gradient(varying)

        def loss(rows):
            op = dataclasses.replace(old, rows=rows)
            codes = op.codes(view.stream.columns)
            h = through(old.h, (codes.T * view.stream.weights[None]) @ codes)
            gram = through(old.gram, layout.gram(layout.leaves(rows))[0])
            own = callers_precision(self.function)
            return own(dataclasses.replace(op, h=h, gram=gram), batch)

        value, rows = jax.value_and_grad(loss)(old.rows)
        return Terms(value, dense=layout.leaves(rows))


def _of(view: View, name: str | None) -> tuple[Stream, jax.Array]:
    """A stream by name and its codes."""
    if name is None:
        return view.stream, view.codes
    stream = view.extra[name]
    return stream, view.operator.codes(stream.columns)


def _pairs(view: View) -> Pairs:
    assert view.pairs is not None  # the learner makes them for purposes with `pairs`
    return view.pairs


def _through(view: View, columns: Columns, codes: jax.Array, cotangent: Columns):
    """Factors of a loss of ``A^T A v``, from its cotangents ``c``: ``z c^T + (A c) v^T``."""
    within = view.operator.codes(cotangent)
    right = [
        jnp.concatenate([c.astype(v.dtype), v]) for c, v in zip(cotangent, columns, strict=True)
    ]
    return jnp.concatenate([codes, within]), right, jnp.concatenate([within, codes])


def _moments(view: View, d: jax.Array):
    """Factors of a loss of ``H`` from ``D = ∂L/∂H``: ``2 D z v^T``."""
    return 2 * view.stream.weights[:, None] * (view.codes @ d), view.stream.columns, view.codes


def _less(a: Columns, b: Columns) -> Columns:
    return [x.astype(y.dtype) - y for x, y in zip(a, b, strict=True)]


def _scaled(columns: Columns, scale: jax.Array) -> Columns:
    return [scale[:, None].astype(c.dtype) * c for c in columns]


def _inner(view: View, a: Columns, b: Columns) -> jax.Array:
    """``(k,)`` inner products of columns with columns."""
    dtype = view.operator.layout.dtype
    parts = [jnp.sum(x.astype(dtype) * y.astype(dtype), axis=1) for x, y in zip(a, b, strict=True)]
    return sum(parts[1:], parts[0])
