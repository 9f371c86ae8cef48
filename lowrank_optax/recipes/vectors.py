"""Recipes that see the parameters as one vector and learn from gradients alone."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import optax

from lowrank_optax import basis as bases
from lowrank_optax import curvature as curvatures
from lowrank_optax import inner as inners
from lowrank_optax._core.checks import check_least
from lowrank_optax._core.types import Inner
from lowrank_optax.engine.vectors import scale_by_lre
from lowrank_optax.recipes._recipe import (
    PeriodicVectorOptions,
    collects,
    decay_weights,
    or_default,
    recipe,
    with_defaults,
)


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
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""The low-rank eigenbasis optimizer, with a curvature, a basis and inner parts of your choice.

    It is `scale_by_lre`, then decoupled weight decay, then the learning rate:

    .. math:: x \leftarrow x - \eta\,\bigl(Q\,\mathrm{inner}(Q^T g) + \lambda_{wd}\, x\bigr)

    The defaults are the parts of the original: the covariance of the gradients, a window of the
    last 100 of them, and cautious Adam, with the norm of its running average. For networks with
    matrices see `soap_muon`.

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
      learning_rate: number or schedule. Start at 1, a hundred times Adam's rate: the default inner
        parts give updates the norm of Adam's in at most ``rank`` coordinates, where Adam has one
        coordinate for every parameter.
      curvature: part that measures, from `lowrank_optax.curvature`.
      basis: part that keeps what was measured, from `lowrank_optax.basis`.
      inner: part that runs in the basis, or a sequence of them, from `lowrank_optax.inner`.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for what `scale_by_lre` refuses and for a negative weight decay; by ``update`` for
        weight decay without params.

    Cost: that of `scale_by_lre`.

    Source: the original LRE.
    """
    return recipe(
        scale_by_lre(curvature, basis, inner, **options),
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
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""GGT: the full-matrix adaptive method on a window of the last gradients.

    ``Covariance() × GGT(rank) × (EMA(b1), LInvSqrt())``, with ``1/eps`` on the complement:

    .. math:: x \leftarrow x - \eta\,(G G^T + \epsilon^2 I)^{-1/2}\,\hat m,\quad
              G = [g_t, \dots, g_{t-r+1}]

    The paper adds ``eps`` to the root; this adds ``eps²`` under it. Both are ``1/eps`` outside the
    window, where the newest gradient has no more than rounding.

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
      learning_rate: number or schedule.
      rank: number of gradients in the window, by default 100. Keep it above ``1/(1-b1)``: where
        gradients shrink, a momentum that reaches further back than the window still holds larger
        ones, and is not scaled down with them.
      b1: decay of the momentum, in [0, 1).
      eps: damping, in units of the norm of the gradient. Well above that norm the step becomes
        ``g/eps``; below ``1e-3`` of it, in float32, rounding is divided by it. Multiply it along
        with the loss.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

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
        weight_decay=weight_decay,
        mask=mask,
        **with_defaults(options, complement=1 / eps),
    )


@collects
def full_matrix_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-16,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the full matrix of second moments, in the span of the last gradients.

    ``Covariance() × GGT(rank) × FullMatrixAdam(identity=False)``:

    .. math:: x \leftarrow x - \eta\, Q\,(\hat M + \epsilon I)^{-1/2}\, \hat m

    ``M`` is the average of ``u u^T`` and ``m`` that of ``u = Q^T g``. Both start at zero, and a hat
    stands for the correction of that. The root is a pseudo-inverse, so nothing moves along
    directions that no gradient has had. The original starts ``M`` as the identity; that is `lre`
    with ``inner=FullMatrixAdam()``.

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
      learning_rate: number or schedule, as for Adam. Updates have about the size 1 along every
        principal axis of the gradients seen, where Adam's have it along every coordinate. The first
        step has one axis: if all ``d`` coordinates have equal gradients, it is Adam's divided by
        ``sqrt(d)``.
      rank: number of gradients in the window, by default 100.
      b1: decay of the mean, in [0, 1).
      b2: decay of the covariance, in [0, 1).
      eps: number added to the eigenvalues of the covariance, in units of the squared gradient: the
        square of Adam's.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

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
        weight_decay=weight_decay,
        mask=mask,
        **options,
    )


@collects
def whiten(
    rank: int | None = None, *, power: float = -0.25, **options: Unpack[PeriodicVectorOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens gradients in the span of the last ones, in front of any optimizer.

    ``Covariance() × GGT(rank, beta=1) × LPower(power)``:

    .. math:: g \mapsto Q\,\Lambda^{p}\,Q^T g,\quad
              Q \Lambda Q^T = \frac{1}{r} \sum_{i<r} g_{t-i}\, g_{t-i}^T

    Directions with large gradients are scaled down more than those with small gradients, so the
    optimizer behind follows more of them. With ``p = -1/4`` the learning rate of that optimizer can
    stay. ``p = -1/2`` gains more on ill-conditioned problems, at smaller rates, and loses where
    gradients are mostly noise.

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
      rank: number of gradients in the window, by default 50.
      power: power ``p`` of the eigenvalues, a number without unit.
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank out of range.

    Cost: that of `GGT`: memory ``rank d``, two passes over it a step.

    Source: the window is that of Agarwal et al., "Efficient Full-Matrix Adaptive Regularization",
    ICML 2019. The power and the order were found by ``benchmarks/optimizers.py``.
    """
    basis, part = bases.GGT(or_default(rank, 50), beta=1.0), inners.LPower(power)
    keywords = with_defaults(options, complement=part)
    return scale_by_lre(curvatures.Covariance(), basis, part, **keywords)


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
    **options: Unpack[PeriodicVectorOptions],
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
      learning_rate: number or schedule, as for Adam.
      rank: number of gradients in the window, by default 50.
      power: power ``p`` of the eigenvalues, a number without unit.
      b1: decay of Adam's mean, in [0, 1).
      b2: decay of Adam's second moment, in [0, 1).
      eps: number added to Adam's root, in units of the whitened gradient.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank out of range.

    Cost: that of `whiten` and of Adam.

    Source: that of `whiten`; Kingma and Ba, "Adam", ICLR 2015.
    """
    return recipe(
        whiten(rank, power=power, **options),
        optax.scale_by_adam(b1, b2, eps),
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
