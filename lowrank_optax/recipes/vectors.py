"""Recipes that see the parameters as one vector, and learn from gradients alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from lowrank_optax import basis as bases
from lowrank_optax import curvature as curvatures
from lowrank_optax import inner as inners
from lowrank_optax._core.checks import check_least
from lowrank_optax._core.types import Inner
from lowrank_optax.engine.vectors import vector_engine
from lowrank_optax.recipes._recipe import collects, decay_weights, or_default, recipe


@collects
def lre(
    learning_rate: optax.ScalarOrSchedule,
    curvature: curvatures.Curvature = curvatures.Covariance(),
    basis: bases.Basis = bases.GGT(rank=100),
    inner: Inner | Sequence[Inner] = (
        inners.Adam(),
        inners.Cautious(),
        inners.ClipNormByEMA(normalize=True),
    ),
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""The low-rank eigenbasis optimizer: curvature, basis and inner parts of your choice.

    `scale_by_lre`, decoupled weight decay, and the learning rate:

    .. math:: x \leftarrow x - \eta\,\bigl(Q\,\mathrm{inner}(Q^T g) + \lambda_{wd}\, x\bigr)

    The defaults are the parts of the original: the gradients' covariance, kept in a window of the
    last 100, and Adam, made cautious, with a norm that follows its running average. For networks
    with matrices see `soap_muon`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.lre(optax.cosine_decay_schedule(1.0, 300), basis=lro.basis.GGT(rank=10))
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule. The default inner parts give an update the running
        average of the norm of Adam's updates in the basis, of at most ``rank`` coordinates where
        Adam's has one for every parameter: start at 1, a hundred times Adam's rate.
      curvature: what is measured, from `lowrank_optax.curvature`.
      basis: how it is kept, from `lowrank_optax.basis`.
      inner: what runs inside, from `lowrank_optax.inner`: one part or a sequence of them.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: as `scale_by_lre`, and by ``update`` for weight decay without params.

    Cost: that of `scale_by_lre`.

    Source: the original LRE.
    """
    return recipe(
        vector_engine(curvature, basis, inner, **options),
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@collects
def ggt(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    eps: float = 1e-2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GGT: the full-matrix adaptive method on a window of the last gradients.

    ``Covariance() × GGT(rank) × (EMA(b1), LInvSqrt())``, with ``1/eps`` on the complement:

    .. math:: x \leftarrow x - \eta\,(G G^T + \epsilon^2 I)^{-1/2}\,\hat m,\quad
              G = [g_t, \dots, g_{t-r+1}]

    The paper adds ``eps`` to the root where this adds ``eps²`` under it; both are ``1/eps`` outside
    the window, where the newest gradient has only what rounding cannot tell from zero.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.ggt(0.3, rank=20)
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(100):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule.
      rank: the window's length. Keep it above ``1/(1-b1)``: where gradients shrink, a momentum that
        remembers larger ones than the window does is not scaled down with them.
      b1: decay of the momentum.
      eps: in units of the gradient's norm: well below it, or the step becomes ``g/eps``, but not
        below rounding, ``1e-3`` of it in float32. Multiply it along with the loss.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range.

    Cost: that of `GGT`.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """
    check_least("ggt", "eps", eps, strict=True)
    return lre(
        learning_rate,
        curvatures.Covariance(),
        bases.GGT(or_default(rank, 100), eig_tol=0.0, update_damping=eps**2),
        (inners.EMA(b1, debias=True), inners.LInvSqrt()),
        **{"complement": 1 / eps, **options},
    )


@collects
def full_matrix_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-16,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the full matrix of second moments, in the span of the last gradients.

    ``Covariance() × GGT(rank) × FullMatrixAdam(identity=False)``:

    .. math:: x \leftarrow x - \eta\, Q\,(\hat M + \epsilon I)^{-1/2}\, \hat m

    with ``M`` the average of ``u u^T`` and ``m`` that of ``u = Q^T g``, both from zero and
    corrected for it, and the pseudo-inverse of the root: what no gradient has shown does not move.
    The original starts ``M`` as the identity: that is ``lre`` with ``inner=FullMatrixAdam()``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.full_matrix_adam(0.1, rank=10)
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule, as for Adam: an update has about the length 1 along
        every principal axis of the gradients seen, where Adam's has it along every coordinate. The
        first has one axis, and all of ``d`` coordinates with equal gradients are Adam's divided by
        ``sqrt(d)``.
      rank: the window's length.
      b1: decay of the mean.
      b2: decay of the covariance.
      eps: added to the covariance's eigenvalues, in units of the squared gradient: the square of
        Adam's.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range.

    Cost: that of `GGT` and a second ``eigh`` of size ``rank`` a step.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with the averages of Adam.
    """
    return lre(
        learning_rate,
        curvatures.Covariance(),
        bases.GGT(or_default(rank, 100)),
        inners.FullMatrixAdam(b1, b2, eps, identity=False),
        **options,
    )


@collects
def whiten(
    rank: int | None = None, *, power: float = -0.25, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens gradients in the span of the last ones; stands in front of any optimizer.

    ``Covariance() × GGT(rank, beta=1) × LPower(power)``:

    .. math:: g \mapsto Q\,\Lambda^{p}\,Q^T g,\quad
              Q \Lambda Q^T = \frac{1}{r} \sum_{i<r} g_{t-i}\, g_{t-i}^T

    What is loud becomes quieter, and quieter directions are heard. ``p = -1/4`` leaves the learning
    rate of what stands behind as it was; ``p = -1/2`` gains more on ill-conditioned problems, at
    smaller rates, and loses where gradients are mostly noise.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = optax.chain(lro.whiten(rank=10), optax.adam(optax.linear_schedule(0.3, 0.0, 200)))
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 10.0, 100.0]))
      >>> x = jnp.zeros(3); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-4)
      True

    Args:
      rank: the window's length.
      power: of the eigenvalues.
      **options: the keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank out of range.

    Cost: that of `GGT`: memory ``rank d``, two passes over it a step.

    Source: the window is that of Agarwal et al., "Efficient Full-Matrix Adaptive Regularization",
    ICML 2019; the power and the order were found by `benchmarks/optimizers.py`.
    """
    engine = _whitening(rank, power, **options)
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def _whitening(rank, power, **options: Any):
    """The engine of `whiten`."""
    basis, part = bases.GGT(or_default(rank, 50), beta=1.0), inners.LPower(power)
    return vector_engine(curvatures.Covariance(), basis, part, **{"complement": part, **options})


@collects
def whitened_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    power: float = -0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on gradients that are whitened in the span of the last ones: `whiten`, then Adam.

    .. math:: x \leftarrow x - \eta\,\mathrm{Adam}\bigl(Q\,\Lambda^{p}\,Q^T g\bigr)

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.whitened_adam(optax.linear_schedule(0.3, 0.0, 200), rank=10)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 10.0, 100.0]))
      >>> x = jnp.zeros(3); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-4)
      True

    Args:
      learning_rate: a number or a schedule, as for Adam.
      rank: the window's length.
      power: of the eigenvalues.
      b1: decay of Adam's mean.
      b2: decay of Adam's second moment.
      eps: added to Adam's root.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_lre`.

    Raises:
      ValueError: for a rank out of range.

    Cost: that of `whiten` and of Adam.

    Source: as `whiten`.
    """
    return recipe(
        _whitening(rank, power, **options),
        optax.scale_by_adam(b1, b2, eps),
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
