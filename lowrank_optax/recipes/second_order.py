"""Recipes that measure curvature: quasi-Newton, Hessian, Fisher, Gauss–Newton."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_optax import basis as bases
from lowrank_optax import curvature as curvatures
from lowrank_optax import inner as inners
from lowrank_optax._core.checks import check, check_least
from lowrank_optax.recipes._recipe import collects, or_default
from lowrank_optax.recipes.vectors import lre


@collects
def lowrank_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rank: int | None = None,
    *,
    rdamping: float = 1e-3,
    curvature: curvatures.Curvature = curvatures.BFGS(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a low-rank quasi-Newton matrix and a scaled identity around it.

    ``BFGS() × Eigen(rank, beta=None) × LInv()``, with ``LInv()`` on the complement:

    .. math:: x \leftarrow x - \eta\, B^{-1} g,\quad
              B = Q\,\mathrm{diag}(\lambda)\,Q^T + \gamma\,(I - Q Q^T)

    Eigenvalues count with their size, so that `SR1`'s negative ones are no ways up, and with
    ``rdamping`` times the largest on top: without, an eigenvalue that a noisy pair or `SR1` puts
    near zero makes one step so long that the next pairs are worthless. There is no line search:
    where a full step is too long pass a smaller ``learning_rate``, or chain the result with
    `optax.scale_by_zoom_linesearch`. Needs ``value_fn`` in ``update``, and the parameters;
    ``curvature=BFGS(product=GradientDifference())`` needs the parameters only.
    Where the Hessian may be singular, `CubicNewton` in place of ``LInv()`` bounds the step.

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
      learning_rate: 1 for Newton's step.
      rank: how many eigenpairs of the quasi-Newton matrix are kept.
      rdamping: share of the largest eigenvalue that is added to all for the step; 0 for the exact
        inverse.
      curvature: `BFGS` or `SR1`.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank or damping out of range, or a curvature that is no correction of the
        matrix; by ``update`` without ``value_fn``.

    Cost: that of `Eigen`, two more passes over the rows and one Hessian product an update.

    Source: Broyden, Fletcher, Goldfarb and Shanno, 1970, and Brand's truncation, 2006, in place of
    the memory of L-BFGS.
    """
    check(
        "initial" in getattr(curvature, "needs", ()),
        f"lowrank_newton sums corrections, those of {curvature} are for an average; combine it "
        "with BFGS or SR1, or pass the other to lro.lre with "
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
        **{"complement": inners.LInv(), **options},
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian on the Hessian's diagonal in its own leading eigenbasis.

    ``SquaredHessian() × Eigen(rank, eig_tol=1e-8) × HutchinsonAdam()``, with ``1/h`` on the
    complement:

    .. math:: x \leftarrow x - \eta\,\Bigl(Q\, \frac{\hat m}{\sqrt{\hat D} + \epsilon}
              + \frac{g - Q Q^T g}{h}\Bigr),\quad
              D \leftarrow b_2 D + (1-b_2)\,\bigl(Q^T z \circ Q^T H z\bigr)^2

    In the eigenbasis the diagonal is most of the Hessian, which along the parameters' axes it is
    not. Outside it ``h`` is the root mean square eigenvalue there, from the same products: the
    rule applied to one shared value. ``complement=None`` keeps to the basis, which is safe where
    curvature outside varies by more than ``2 / learning_rate`` around ``h``. Needs ``value_fn`` in
    ``update``, and the parameters.

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
      learning_rate: relative to Newton's step along the basis, which is about 1.
      rank: how many eigenpairs are kept.
      b1: decay of the mean.
      b2: decay of the squared estimates, an update of the basis.
      eps: added to the root, in units of the curvature.
      curvature: what gives the products.
      **options: the keywords of `lre` and `scale_by_lre`; ``update_every`` for rarer products.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range; by ``update`` without ``value_fn``.

    Cost: that of `Eigen`, and two Hessian products and one more pass over the rows on every update
    of the basis: of the first the basis is made, with the second it is measured.

    Source: Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning", AAAI
    2021.
    """
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(or_default(rank, 20), eig_tol=1e-8),
        inners.HutchinsonAdam(b1, b2, eps),
        **{"complement": _newton_outside(curvature), **options},
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
    update_every: int | Callable[[jax.Array], jax.Array] = 10,
    curvature: curvatures.Curvature = curvatures.SquaredHessian(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-H on the Hessian's diagonal in its own leading eigenbasis.

    ``SquaredHessian() × Eigen(rank, eig_tol=1e-8) × (HutchinsonAdam(gamma=gamma, debias=False),
    ClipValue(1))``, with ``1/s`` on the complement:

    .. math:: x \leftarrow x - \eta\, \Bigl(Q\, \mathrm{clip}\!\left(
              \frac{m}{\max(\gamma h, \epsilon)}, 1\right)
              + \frac{g - Q Q^T g}{s}\Bigr),\quad
              h \leftarrow b_2 h + (1-b_2)\; Q^T z \circ Q^T H z

    Outside the basis ``s`` is the root mean square eigenvalue there, from the same products; the
    step is a share of Newton's and is not clipped. ``complement=None`` keeps to the basis;
    ``complement=optax.scale_by_adam()`` has steps of the clipped ones' size, at two vectors of
    state. Needs ``value_fn`` in ``update``, and the parameters.

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
      learning_rate: the largest step along any direction of the basis.
      rank: how many eigenpairs are kept.
      b1: decay of the mean.
      b2: decay of the diagonal, an update of the basis.
      eps: the least denominator, in units of the curvature.
      gamma: share of the curvature in the denominator: the larger, the fewer steps are clipped.
      update_every: steps between two Hessian products.
      curvature: what gives the products.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or ``gamma`` out of range; by ``update`` without
        ``value_fn``.

    Cost: that of `Eigen`, and two Hessian products and one more pass over the rows on every update
    of the basis: of the first the basis is made, with the second it is measured.

    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", 2023.
    """
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(or_default(rank, 20), eig_tol=1e-8),
        (inners.HutchinsonAdam(b1, b2, eps, gamma, debias=False), inners.ClipValue(1.0)),
        update_every=update_every,
        **{"complement": _newton_outside(curvature), **options},
    )


def _newton_outside(curvature: curvatures.Curvature) -> inners.LPower:
    """The power of the curvature outside the basis that is one over the size of a Hessian's."""
    squared = isinstance(curvature, curvatures.SquaredHessian)
    return inners.LInvSqrt() if squared else inners.LInv()


@collects
def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    beta: float = 0.9,
    damping: float = 1.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Online natural gradient: the running average of the empirical Fisher matrix, inverted.

    ``EmpiricalFisher() × Eigen(rank, beta, count_columns=False, damp_first=False) × LInv()``, with
    ``1/damping`` on the complement:

    .. math:: x \leftarrow x - \eta\,(\hat F_r + \mu I)^{-1} g,\quad
              F \leftarrow \beta F + (1-\beta) \sum_i g_i g_i^T

    with ``F_r`` the ``rank`` leading eigenpairs of ``F``, corrected for its start. No direction has
    a longer step than gradient descent of rate ``learning_rate / damping``, which is the step
    outside the basis, inside where the gradients are small, and thus near an optimum. The default
    damping makes that rate the learning rate itself: the recipe is stable where gradient descent of
    the same rate is. The first step only fills the basis. Needs ``losses_fn`` and the parameters,
    or ``per_example_grads``, in ``update``.

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
      learning_rate: a number or a schedule; ``damping`` times the rate of gradient descent on the
        summed loss, or less.
      rank: how many eigenpairs are kept.
      beta: decay of the average.
      damping: ``mu``, added to all eigenvalues, those outside the basis included; in units of the
        summed squared gradients, below the largest of which it has to be to change anything.
      **options: the keywords of `lre` and `scale_by_lre`.

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
        **{"warmup_steps": 1, "complement": 1 / damping, **options},
    )


@collects
def gauss_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    batch: int | None = None,
    *,
    damping: float = 1e-3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton in the dual: exact on the current batch, at any number of parameters.

    ``GaussNewton() × GGT(rank=batch, renew=True) × LInv()``: the window holds the rows of this
    step's Jacobian and no older ones,

    .. math:: x \leftarrow x - \eta\,(J^T J + \mu I)^{-1} J^T r
              = x - \eta\, J^T (J J^T + \mu I)^{-1} r

    The gradient has to be ``J^T r``, that of ``‖r‖²/2``. Needs ``residuals_fn`` and the parameters
    in ``update``. For deterministic problems, and for small residuals in float32, there is
    `lowrank_optax.levenberg_marquardt`, whose damping adapts.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> a = jax.random.normal(jax.random.key(0), (4, 9))
      >>> residuals = lambda x: a @ x - 1
      >>> loss = lambda x: jnp.sum(residuals(x) ** 2) / 2
      >>> tx = lro.gauss_newton(batch=4, damping=1e-6)
      >>> x = jnp.zeros(9); state = tx.init(x)
      >>> updates, state = tx.update(jax.grad(loss)(x), state, x, residuals_fn=residuals)
      >>> bool(loss(x + updates) < 1e-6)                  # linear: one step
      True

    Args:
      learning_rate: 1 for the Gauss-Newton step.
      batch: the most residuals that come at once, ``k``; fewer leave rows empty.
      damping: Levenberg's ``mu``, in units of the squared gradients of the residuals.
      **options: the keywords of `lre` and `scale_by_lre`.

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
        **options,
    )
