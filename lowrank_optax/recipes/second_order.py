"""Recipes that measure the curvature of the loss: quasi-Newton, Hessian, Fisher, Gauss–Newton."""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from lowrank_optax import basis as bases
from lowrank_optax import curvature as curvatures
from lowrank_optax import inner as inners
from lowrank_optax._core.checks import check, check_least
from lowrank_optax.recipes._recipe import (
    Period,
    PeriodicVectorOptions,
    VectorOptions,
    collects,
    or_default,
    with_defaults,
)
from lowrank_optax.recipes.vectors import lre


@collects
def lowrank_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rank: int | None = None,
    *,
    rdamping: float = 1e-3,
    curvature: curvatures.Curvature = curvatures.BFGS(),
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a low-rank quasi-Newton matrix and a scaled identity around it.

    ``BFGS() × Eigen(rank, beta=None) × LInv()``, with ``LInv()`` on the complement:

    .. math:: x \leftarrow x - \eta\, B^{-1} g,\quad
              B = Q\,\mathrm{diag}(\lambda)\,Q^T + \gamma\,(I - Q Q^T)

    Eigenvalues count with their size, so that the negative ones of `SR1` do not make the step
    climb. ``rdamping`` times the largest is added to all of them. Without it, a noisy pair or `SR1`
    can put an eigenvalue near zero; the step is then so long that the next pairs are worthless.

    There is no line search. Where a full step is too long, pass a smaller ``learning_rate``, or
    chain the result with `optax.scale_by_zoom_linesearch`. Where the Hessian may be singular,
    `CubicNewton` in place of ``LInv()`` bounds the step. ``update`` needs ``value_fn`` and the
    parameters; with ``curvature=BFGS(product=GradientDifference())`` the parameters alone.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.lowrank_newton(rank=3)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1., 10., 100.]))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(30):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-6)
      True

    Args:
      learning_rate: number or schedule, by default 1 for Newton's step.
      rank: number of eigenpairs of the quasi-Newton matrix that are kept, by default 20.
      rdamping: share of the largest eigenvalue that is added to all for the step, a number without
        unit; 0 for the exact inverse.
      curvature: quasi-Newton part, `BFGS` (the default) or `SR1`.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank or damping out of range, or a curvature whose corrections are for an
        average; by ``update`` without ``value_fn``.

    Cost: that of `Eigen`, two more passes over the rows and one Hessian product an update.

    Source: Broyden, Fletcher, Goldfarb and Shanno, 1970, and Brand's truncation, 2006, in place of
    the memory of L-BFGS.
    """
    check(
        "initial" in getattr(curvature, "needs", ()),
        f"lowrank_newton adds corrections up, and those of {curvature} are for an average; combine "
        "it with BFGS or SR1, or pass this curvature to lro.lre with "
        "basis=lro.basis.Eigen(rank, beta=0.99).",
    )
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(
            or_default(rank, 20),
            None,
            eig_tol=1e-8,
            update_damping=0.0,
            update_rdamping=rdamping,
            update_abs=True,
        ),
        inners.LInv(),
        weight_decay=weight_decay,
        mask=mask,
        **with_defaults(options, complement=inners.LInv()),
    )


@collects
def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    curvature: curvatures.Curvature = curvatures.SquaredHessian(),
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian on the Hessian's diagonal in its own leading eigenbasis.

    ``SquaredHessian() × Eigen(rank, eig_tol=1e-8) × HutchinsonAdam()``, with ``1/h`` on the
    complement:

    .. math:: x \leftarrow x - \eta\,\Bigl(Q\, \frac{\hat m}{\sqrt{\hat D} + \epsilon}
              + \frac{g - Q Q^T g}{h}\Bigr),\quad
              D \leftarrow b_2 D + (1-b_2)\,\bigl(Q^T z \circ Q^T H z\bigr)^2

    In its own eigenbasis the Hessian is nearly diagonal, which along the axes of the parameters it
    is not. Outside the basis one value stands for all: ``h`` is the root mean square eigenvalue
    there, from the same products. ``complement=None`` keeps to the basis; it is the
    safe choice where a curvature outside exceeds ``2 h / learning_rate``. ``update`` needs
    ``value_fn`` and the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.adahessian(0.1, rank=3)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1., 10., 100.]))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-3)
      True

    Args:
      learning_rate: number or schedule, relative to Newton's step along the basis, which is about
        1.
      rank: number of eigenpairs that are kept, by default 20.
      b1: decay of the mean, in [0, 1).
      b2: decay of the squared estimates, in [0, 1), an update of the basis.
      eps: number added to the root, in units of the curvature.
      curvature: part that measures products, by default `SquaredHessian`.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`; ``update_every`` makes products rarer.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range; by ``update`` without ``value_fn``.

    Cost: that of `Eigen`, and two Hessian products and one more pass over the rows on every update
    of the basis. The first product makes the basis, the second measures the diagonal in it.

    Source: Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning", AAAI
    2021.
    """
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(or_default(rank, 20), eig_tol=1e-8),
        inners.HutchinsonAdam(b1, b2, eps),
        weight_decay=weight_decay,
        mask=mask,
        **with_defaults(options, complement=_newton_outside(curvature)),
    )


@collects
def sophia_h(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.965,
    b2: float = 0.99,
    eps: float = 1e-12,
    gamma: float = 0.01,
    update_every: Period = 10,
    curvature: curvatures.Curvature = curvatures.SquaredHessian(),
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[VectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-H on the Hessian's diagonal in its own leading eigenbasis.

    ``SquaredHessian() × Eigen(rank, eig_tol=1e-8) × (HutchinsonAdam(gamma=gamma, debias=False),
    ClipValue(1))``, with ``1/s`` on the complement:

    .. math:: x \leftarrow x - \eta\, \Bigl(Q\, \mathrm{clip}\!\left(
              \frac{m}{\max(\gamma h, \epsilon)}, 1\right)
              + \frac{g - Q Q^T g}{s}\Bigr),\quad
              h \leftarrow b_2 h + (1-b_2)\; Q^T z \circ Q^T H z

    Outside the basis ``s`` is the root mean square eigenvalue there, from the same products. The
    step there is a share of Newton's and is not clipped. ``complement=None`` keeps to the basis.
    ``complement=optax.scale_by_adam()`` takes steps of the size of the clipped ones, at two vectors
    of state. ``update`` needs ``value_fn`` and the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.sophia_h(0.01, rank=3)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1., 3., 9.]))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 0.1)
      True

    Args:
      learning_rate: number or schedule, the largest step along any direction of the basis.
      rank: number of eigenpairs that are kept, by default 20.
      b1: decay of the mean, in [0, 1).
      b2: decay of the diagonal, in [0, 1), an update of the basis.
      eps: smallest denominator, in units of the curvature.
      gamma: positive factor of the curvature in the denominator; the larger it is, the fewer steps
        are clipped.
      update_every: number of steps between two Hessian products, or a schedule of it.
      curvature: part that measures products, by default `SquaredHessian`.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or ``gamma`` out of range; by ``update`` without
        ``value_fn``.

    Cost: that of `Eigen`, and two Hessian products and one more pass over the rows on every update
    of the basis. The first product makes the basis, the second measures the diagonal in it.

    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", 2023.
    """
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(or_default(rank, 20), eig_tol=1e-8),
        (inners.HutchinsonAdam(b1, b2, eps, gamma, debias=False), inners.ClipValue(1.0)),
        update_every=update_every,
        weight_decay=weight_decay,
        mask=mask,
        **with_defaults(options, complement=_newton_outside(curvature)),
    )


def _newton_outside(curvature: curvatures.Curvature) -> inners.LPower:
    """The power of a curvature that is one over the size of the Hessian's eigenvalues."""
    squared = isinstance(curvature, curvatures.SquaredHessian)
    return inners.LInvSqrt() if squared else inners.LInv()


@collects
def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    beta: float = 0.9,
    damping: float = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Online natural gradient: the running average of the empirical Fisher matrix, inverted.

    ``EmpiricalFisher() × Eigen(rank, beta, count_columns=False, damp_first=False) × LInv()``, with
    ``1/damping`` on the complement:

    .. math:: x \leftarrow x - \eta\,(\hat F_r + \mu I)^{-1} g,\quad
              F \leftarrow \beta F + (1-\beta) \sum_i g_i g_i^T

    where ``F_r`` holds the ``rank`` leading eigenpairs of ``F``, and the hat corrects its start.
    Outside the basis, and inside where gradients are small, the step is that of gradient descent
    with the rate ``learning_rate / damping``; along no direction is it longer. Near an optimum
    gradients are small everywhere. With the default damping that rate is the learning rate itself,
    and the recipe is stable where gradient descent of that rate is. The first step only fills the
    basis. ``update`` needs ``losses_fn`` and the parameters, or ``per_example_grads``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.natural_gradient(0.3, rank=3, damping=10.0)
      >>> a = jax.random.normal(jax.random.key(0), (16, 3))
      >>> losses = lambda x: (a @ (x - 1)) ** 2 / 2
      >>> loss = lambda x: jnp.sum(losses(x))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, losses_fn=losses))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(50):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: number or schedule, at most ``damping`` times the rate of gradient descent on
        the summed loss.
      rank: number of eigenpairs that are kept, by default 20.
      beta: decay of the average, in [0, 1).
      damping: positive number ``mu`` that is added to all eigenvalues, inside and outside the
        basis, in units of the summed squared gradients. Far above the largest eigenvalue of ``F``
        it leaves nothing but gradient descent.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay or damping out of range; by ``update`` without per-example
        losses or gradients.

    Cost: that of `Eigen`, and the gradients of all examples on every update of the basis.

    Source: Le Roux, Manzagol and Bengio, "Topmoumoute online natural gradient algorithm", NIPS
    2007.
    """
    check_least("natural_gradient", "damping", damping, strict=True)
    return lre(
        learning_rate,
        curvatures.EmpiricalFisher(),
        bases.Eigen(
            or_default(rank, 20),
            beta,
            count_columns=False,
            damp_first=False,
            update_damping=damping,
        ),
        inners.LInv(),
        weight_decay=weight_decay,
        mask=mask,
        **with_defaults(options, warmup_steps=1, complement=1 / damping),
    )


@collects
def gauss_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    batch: int | None = None,
    damping: float = 1e-3,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[PeriodicVectorOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton in the dual: exact on the current batch, at any number of parameters.

    ``GaussNewton() × GGT(rank=batch, renew=True) × LInv()``: the window holds the rows of the
    Jacobian of this step and no older ones,

    .. math:: x \leftarrow x - \eta\,(J^T J + \mu I)^{-1} J^T r
              = x - \eta\, J^T (J J^T + \mu I)^{-1} r

    The gradient has to be ``J^T r``, that of ``‖r‖²/2``. ``update`` needs ``residuals_fn`` and the
    parameters. For deterministic problems, and for small residuals in float32, take
    `lowrank_optax.levenberg_marquardt`, whose damping adapts.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> a = jax.random.normal(jax.random.key(0), (4, 9))
      >>> residuals = lambda x: a @ x - 1
      >>> loss = lambda x: jnp.sum(residuals(x) ** 2) / 2
      >>> tx = lro.gauss_newton(batch=4, damping=1e-6)
      >>> x = jnp.zeros(9); state = tx.init(x)
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, residuals_fn=residuals))
      >>> updates, state = update(jax.grad(loss)(x), state, x)
      >>> bool(loss(x + updates) < 1e-6)                  # linear: one step
      True

    Args:
      learning_rate: number or schedule, by default 1 for the Gauss-Newton step.
      batch: largest number ``k`` of residuals that come at once, by default 100; fewer leave rows
        empty.
      damping: Levenberg's ``mu``, in units of the squared gradients of the residuals.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a batch or damping out of range; by ``update`` without ``residuals_fn``, and
        for more residuals than ``batch``.

    Cost: memory ``k d``; a step ``k`` gradients, ``2 k² d`` flops and one ``eigh`` of size ``k``.

    Source: Levenberg, 1944; Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural
    gradient methods for training neural networks", 2019, for the dual form.
    """
    return lre(
        learning_rate,
        curvatures.GaussNewton(),
        bases.GGT(or_default(batch, 100), renew=True, eig_tol=0.0, update_damping=damping),
        inners.LInv(),
        weight_decay=weight_decay,
        mask=mask,
        **options,
    )
