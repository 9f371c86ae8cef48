"""Recipes that see every leaf as a matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import basis as bases
from lowrank_optax import inner as inners
from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_least
from lowrank_optax.engine.matrices import scale_by_matrix_lre
from lowrank_optax.recipes._recipe import (
    MatrixOptions,
    Period,
    collects,
    decay_weights,
    or_default,
    recipe,
    with_defaults,
)


@collects
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    update_every: Period = 200,
    scale: float = 0.25,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[MatrixOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam in the leading singular directions of every matrix's gradient.

    ``SubspaceIteration(rank, beta=0)`` on the shorter side × ``Adam``:

    .. math:: X \leftarrow X - \eta\,\alpha\,P\,\mathrm{Adam}(P^T G),\quad
              P = [p_1, \dots, p_r],\ G G^T p_i = \sigma_i^2 p_i

    Two things differ from the paper. There ``P`` comes from a full singular value decomposition;
    here it comes from subspace iteration that starts from the last ``P``. There Adam's moments stay
    as they are when ``P`` changes; here they move with it. Leaves that are not matrices go through
    Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.galore(0.1, rank=2, update_every=20, scale=1.0)
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: number or schedule.
      rank: number of directions of the projection, by default 128.
      b1: decay of the mean, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: number added to the root, in units of the gradient.
      update_every: number of steps between two projections, or a schedule of it.
      scale: factor ``alpha`` of the step of matrices, relative to that of all other leaves.
      largest: longest side that is projected; a matrix whose shorter side is longer goes through
        Adam. ``None`` (the default) for no limit.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_matrix_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or number of steps out of range.

    Cost: that of `scale_by_matrix_lre`; a matrix ``(a, b)``, ``a <= b``, has ``r a + 2 r b``
    numbers of state.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024.
    """
    check_least("galore", "scale", scale)
    inner = inners.Adam(b1, b2, eps), inners.Optax(optax.scale(scale), laws=optax.EmptyState())
    return _matrix_recipe(
        learning_rate,
        (bases.SubspaceIteration(or_default(rank, 128), beta=0.0), None, inner),
        optax.scale_by_adam(b1, b2, eps),
        weight_decay,
        mask,
        update_every=update_every,
        largest=largest,
        **options,
    )


@collects
def soap(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    update_every: int = 10,
    one_sided: bool = False,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[MatrixOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the eigenbases of Shampoo's two matrices.

    ``FullMatrix(b2, update_every=update_every)`` on both sides × ``Adam(b1, b2)``:

    .. math:: X \leftarrow X - \eta\,Q_L\,\mathrm{Adam}(Q_L^T G\,Q_R)\,Q_R^T,\quad
              L \leftarrow b_2 L + (1-b_2) G G^T,\ R \leftarrow b_2 R + (1-b_2) G^T G

    Three things differ from the paper. There one QR step of power iteration turns the bases; here
    they are eigenvectors. There the second moment stays as it is when the bases turn; here it moves
    as ``(C_L∘C_L) V (C_R∘C_R)^T``. There a step is taken in the bases of the steps before; here the
    newest gradient is already in them. As in the paper the bases are complete, the mean moves with
    them, and the first step only fills them. Coordinates below four roundings of the gradient's
    norm count as zero, because Adam would scale that rounding up. Leaves that are not matrices go
    through Adam.

    With a ``rank`` the sides are ``SubspaceIteration(rank, b2)``. They keep that many directions
    each, and average only the gradients of the steps that update them. The rest of a gradient is
    divided by the running root mean square of its entries, one number for each leaf, and
    multiplied by ``sqrt((1 - b1) / (1 + b1))``, the size that Adam's mean has in pure noise.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.soap(0.1)
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: number or schedule.
      rank: number of directions that each side keeps; ``None`` (the default) for all.
      b1: decay of the mean, in [0, 1).
      b2: decay of the second moment and of ``L`` and ``R``, in [0, 1).
      eps: number added to the root, in units of the gradient.
      update_every: number of steps from one turn of the bases to the next.
      one_sided: whether the shorter side alone has a basis, as in the paper's section on cost;
        ``False`` by default.
      largest: longest side that has a basis, by default 10,000; matrices of which no side has one
        go through Adam.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_matrix_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or number of steps out of range.

    Cost: that of `scale_by_matrix_lre`; a matrix ``(a, b)`` has ``2 a² + 2 b² + 2 a b`` numbers of
    state, with a rank ``r (a + b) + 2 r²``.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024.
    """
    if rank is None:
        # Adam does not read eigenvalues, so small ones do no harm and no direction is dropped.
        side = bases.FullMatrix(b2, update_every=update_every, eig_tol=0.0)
        keywords = with_defaults(options, update_every=1)
    else:
        side = bases.SubspaceIteration(rank, b2)
        quiet = optax.chain(_scale_by_leaf_rms(b2, eps), optax.scale(((1 - b1) / (1 + b1)) ** 0.5))
        keywords = with_defaults(options, update_every=update_every, complement=quiet)
    return _matrix_recipe(
        learning_rate,
        (side, None if one_sided else side, inners.Adam(b1, b2, eps)),
        optax.scale_by_adam(b1, b2, eps),
        weight_decay,
        mask,
        largest=or_default(largest, 10_000),
        **with_defaults(keywords, warmup_steps=1),
    )


@collects
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    beta: float = 0.99,
    power: float = -0.25,
    eig_tol: float = 1e-6,
    update_every: int = 10,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[MatrixOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo: the momentum between two roots of the sides' covariances.

    ``FullMatrix(beta)`` on both sides × ``(EMA(b1), LPower(2 power))``:

    .. math:: X \leftarrow X - \eta\,L^{p} M R^{p},\quad
              L \leftarrow \beta L + (1-\beta) G G^T,\ R \leftarrow \beta R + (1-\beta) G^T G

    Two things differ from the paper: sums are averages, and a pseudo-inverse takes the place of
    ``epsilon``: directions below ``eig_tol`` of the largest eigenvalue get no step. Leaves that are
    not matrices go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.shampoo(optax.linear_schedule(0.5, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: number or schedule.
      b1: decay of the momentum, in [0, 1).
      beta: decay of both covariances, in [0, 1).
      power: of both sides, ``p``: -1/4 in the paper (the default), -1/2 in later versions.
      eig_tol: eigenvalues below this share of the largest are left out.
      update_every: number of steps from one turn of the bases to the next.
      largest: longest side that has a basis, by default 10,000; matrices of which no side has one
        go through Adam.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_matrix_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a decay, power or number of steps out of range.

    Cost: that of `scale_by_matrix_lre`; a matrix ``(a, b)`` has ``2 a² + 2 b² + a b`` numbers of
    state.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization",
    ICML 2018; the power -1/2 and the averages: Shi et al., "A Distributed Data-Parallel PyTorch
    Implementation of the Distributed Shampoo Optimizer", 2023.
    """
    side = bases.FullMatrix(beta, update_every=update_every, eig_tol=eig_tol)
    inner = inners.EMA(b1, debias=True), inners.LPower(2 * power)
    return _matrix_recipe(
        learning_rate,
        (side, side, inner),
        optax.scale_by_adam(b1),
        weight_decay,
        mask,
        largest=or_default(largest, 10_000),
        **with_defaults(options, update_every=1),
    )


class _LeafRMS(NamedTuple):
    """State of `_scale_by_leaf_rms`, with ``(n,)`` numbers for ``n`` leaves.

    Attributes:
      count: number of updates that were not zero.
      square: average of their mean square, not corrected for its start.
    """

    count: jax.Array
    square: jax.Array


def _scale_by_leaf_rms(decay: float, eps: float) -> optax.GradientTransformation:
    """Divides every leaf by the root of the running average of the mean square of its entries."""

    def init(params: Any) -> _LeafRMS:
        n = len(jax.tree.leaves(params))
        return _LeafRMS(jnp.zeros(n, jnp.int32), jnp.zeros(n))

    def update(updates: Any, state: Any, params: Any = None):
        leaves, treedef = jax.tree.flatten(updates)
        mean = jnp.stack([jnp.mean(jnp.square(x)) for x in leaves]).astype(state.square.dtype)
        seen = mean > 0
        count = linalg.tally(state.count, seen)
        square = jnp.where(seen, decay * state.square + (1 - decay) * mean, state.square)
        whole = square / (1 - jnp.asarray(decay, square.dtype) ** jnp.maximum(count, 1))
        size = jnp.sqrt(whole) + eps
        scaled = [x / c.astype(x.dtype) for x, c in zip(leaves, size, strict=True)]
        return treedef.unflatten(scaled), _LeafRMS(count, square)

    return optax.GradientTransformation(init, update)


def _matrix_recipe(
    learning_rate: optax.ScalarOrSchedule,
    parts: tuple[Any, Any, Any],
    others: optax.GradientTransformation,
    weight_decay: Any,
    mask: Any,
    then: optax.GradientTransformation = optax.identity(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_matrix_lre`, decoupled weight decay, learning rate."""
    keywords = with_defaults(options, rest=others)
    return recipe(
        scale_by_matrix_lre(*parts, **keywords),
        then,
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
