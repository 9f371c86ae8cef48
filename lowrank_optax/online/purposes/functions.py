"""Purposes that are defined by a function which the caller passes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check
from lowrank_optax._core.precision import callers_precision
from lowrank_optax.online.purposes._purpose import Batch, Purpose, Terms, View, through


@dataclasses.dataclass(frozen=True)
class Activation(Purpose):
    r"""Activation geometry: what comes after a bottleneck ``A^T A h`` is to say the same.

    .. math:: L = E\,\mathrm{KL}(\mathrm{softmax}\,\phi(h) \,‖\, \mathrm{softmax}\,\phi(A^T A h)),
              \qquad \partial A = z c^T + (A c) h^T, \quad c = \frac{\partial L}{\partial A^T A h}

    where ``φ``, the ``head``, is the rest of the network.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> purpose = lro.online.Activation(1.0, head=lambda h: h @ jnp.eye(8, 3))
      >>> learner = lro.online.learner(2, (purpose,))
      >>> state = jax.eval_shape(learner.init, jax.random.key(0), jnp.zeros(8))
      >>> print(state.operator.rows.shape)              # a bottleneck of 2 for activations of 8
      (2, 8)

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      head: function of one vector, shaped like the example, that returns logits ``(n,)``.

    Raises:
      ValueError: for a negative weight, or a head that is not a function.

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
        return Terms(value, *through(view, columns, view.codes, cotangent))


@dataclasses.dataclass(frozen=True)
class Custom(Purpose):
    r"""A purpose that is any differentiable function of ``(operator, batch)``.

    The gradient goes through ``operator.encode`` and the operator's other methods. ``operator.h``
    is differentiated as the average over the stream that it is, ``∂H = E[∂(z z^T)]``, not as one
    step of a running average.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> def sparse(operator, batch):
      ...     return jnp.mean(jnp.abs(operator.encode(batch.vectors)))
      >>> learner = lro.online.learner(4, purposes=(lro.online.Custom(0.1, sparse),))
      >>> [type(p).__name__ for p in learner.purposes]
      ['Reconstruction', 'Custom']

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      function: function ``(operator, batch) -> scalar``; for the second argument see `Batch`.
        Vectors that are not finite come as zeros of weight zero.
      names: names of the extra streams that it needs, default none.

    Raises:
      ValueError: for a negative weight, or something that is not a function.

    Cost: the function's, and ``4 r² d`` flops to keep its gradient tangent to orthonormal rows.

    Source: elementary.
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
