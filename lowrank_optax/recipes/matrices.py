"""Recipes that see every leaf as a matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import basis as bases
from lowrank_optax import inner as inners
from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_least
from lowrank_optax._core.types import SCALAR, SECOND_MOMENT, VECTOR
from lowrank_optax.engine.matrices import matrix_engine
from lowrank_optax.engine.orthogonal import orthogonalize
from lowrank_optax.recipes._recipe import collects, decay_weights, or_default, recipe


@collects
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    update_every: int | Callable[[jax.Array], jax.Array] = 200,
    scale: float = 0.25,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam in the leading singular directions of every matrix's gradient.

    ``SubspaceIteration(rank, beta=0)`` on the shorter side × ``Adam``, now and then anew:

    .. math:: X \leftarrow X - \eta\,\alpha\,P\,\mathrm{Adam}(P^T G),\quad
              P = [p_1, \dots, p_r],\ G G^T p_i = \sigma_i^2 p_i

    The paper takes ``P`` from a full singular value decomposition and leaves Adam's moments as they
    are when ``P`` changes; here a randomised one with the last ``P`` for a start, and the moments
    move with it. All leaves that are no matrices go through Adam.

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
      learning_rate: a number or a schedule.
      rank: of the projection.
      b1: decay of the mean.
      b2: decay of the second moment.
      eps: added to the root.
      update_every: steps between two projections.
      scale: ``alpha``, relative to the step of all other leaves.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_matrix_lre`.

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
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the eigenbases of Shampoo's two matrices.

    ``FullMatrix(b2, every=update_every)`` on both sides × ``Adam(b1, b2)``:

    .. math:: X \leftarrow X - \eta\,Q_L\,\mathrm{Adam}(Q_L^T G\,Q_R)\,Q_R^T,\quad
              L \leftarrow b_2 L + (1-b_2) G G^T,\ R \leftarrow b_2 R + (1-b_2) G^T G

    The paper turns the bases by one QR step of power iteration, here they are eigenvectors. Both
    are complete: a direction that no gradient has reached is there for the one that will. What is
    not above four roundings of the gradient's norm counts as zero, or Adam would blow it up. There
    the second moment stays as it is when the bases turn, here it moves as
    ``(C_L∘C_L) V (C_R∘C_R)^T``; the mean moves in both. In both the first step only fills the
    bases; there a step is taken in those of the steps before, here the newest gradient is in them.

    With a ``rank`` the sides are ``SubspaceIteration(rank, b2)``: as many directions of each side
    are kept, and of the gradients only those of the steps that update the bases are averaged. What
    is left of a gradient outside is divided by the running root mean square of its entries, one
    number a matrix, and scaled as Adam's mean would be if all of it were noise, by
    ``sqrt((1 - b1) / (1 + b1))``. All leaves that are no matrices go through Adam.

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
      learning_rate: a number or a schedule.
      rank: directions of each side, ``None`` for all.
      b1: decay of the mean.
      b2: decay of the second moment and of ``L`` and ``R``.
      eps: added to the root.
      update_every: steps from one turn of the bases to the next.
      largest: sides longer than this, by default 10,000, have no basis; matrices of which no side
        has one go through Adam.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_matrix_lre`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or number of steps out of range.

    Cost: that of `scale_by_matrix_lre`; a matrix ``(a, b)`` has ``2 a² + 2 b² + 2 a b`` numbers of
    state, with a rank ``r (a + b) + 2 r²``.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024.
    """
    # optax.inject_hyperparams traces default numbers, and shapes depend on ``largest``.
    if rank is None:
        # Eigenvalues are not read, so there is nothing to lose by keeping all that can be told.
        side = bases.FullMatrix(b2, every=update_every, eig_tol=0.0)
        options = {"update_every": 1, **options}
    else:
        side = bases.SubspaceIteration(rank, b2)
        quiet = optax.chain(_scale_by_leaf_rms(b2, eps), optax.scale(((1 - b1) / (1 + b1)) ** 0.5))
        options = {"update_every": update_every, "complement": quiet, **options}
    return _matrix_recipe(
        learning_rate,
        (side, side, inners.Adam(b1, b2, eps)),
        optax.scale_by_adam(b1, b2, eps),
        weight_decay,
        mask,
        **{"warmup_steps": 1, "largest": 10_000 if largest is None else largest, **options},
    )


@collects
def soap_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    update_every: int = 10,
    rms: float = 0.2,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP's step made orthogonal as Muon's is: for networks, the best recipe measured here.

    `soap` with Nesterov's momentum, then `orthogonalize`:

    .. math:: X \leftarrow X - \eta\,\rho\,\sqrt{\max(a, b)}\;
              \mathrm{polar}\bigl(Q_L\,\mathrm{NAdam}(Q_L^T G\,Q_R)\,Q_R^T\bigr)

    Muon orthogonalises the momentum as it comes, noise and all; here every pair of eigendirections
    is first divided by the size of its own gradients. Leaves that are no matrices, biases and
    scales, go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.soap_muon(optax.linear_schedule(0.5, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule that falls, as steps do not shrink by themselves.
        Updates have the size of Adam's: start from 1e-2.
      b1: decay of the mean.
      b2: decay of the second moment and of both sides' matrices.
      eps: added to the root.
      update_every: steps from one turn of the bases to the next. 3 was better on deep narrow
        networks, at about twice the time.
      rms: root mean square of a matrix's update at learning rate 1.
      largest: sides longer than this, by default 1024, have no basis (embeddings); matrices of
        which no side has one go through Adam and are then made orthogonal.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_matrix_lre`.

    Raises:
      ValueError: for a decay, ``eps``, ``rms`` or number of steps out of range.

    Cost: that of `soap` and of `orthogonalize`.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024; Jordan et al.,
    "Muon", 2024.
    """
    side = bases.FullMatrix(b2, every=update_every, eig_tol=0.0)
    laws: Any = optax.ScaleByAdamState(
        SCALAR,  # pyright: ignore[reportArgumentType]
        VECTOR,  # pyright: ignore[reportArgumentType]
        SECOND_MOMENT,  # pyright: ignore[reportArgumentType]
    )
    inner = inners.Optax(optax.scale_by_adam(b1, b2, eps, nesterov=True), laws=laws)
    return _matrix_recipe(
        learning_rate,
        (side, side, inner),
        optax.scale_by_adam(eps=eps),
        weight_decay,
        mask,
        then=orthogonalize(rms, view=options.get("view")),
        **{"warmup_steps": 1, "largest": 1024 if largest is None else largest, **options},
    )


class _LeafRMS(NamedTuple):
    """Of every leaf, ``(n,)`` each: steps that were not zero, the average of the mean square."""

    count: jax.Array
    square: jax.Array


def _scale_by_leaf_rms(decay: float, eps: float) -> optax.GradientTransformation:
    """Divides every leaf by the root of the running average of its entries' mean square."""

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
    learning_rate, parts, others, weight_decay, mask, then=optax.identity(), **options: Any
):
    """`scale_by_matrix_lre`, decoupled weight decay, learning rate."""
    options = {"rest": others, **options}
    return recipe(
        matrix_engine(*parts, **options),
        then,
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
