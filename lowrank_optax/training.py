"""A flax TrainState that forwards the extra arguments of ``update``."""

from typing import Any

try:
    import optax
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        "lowrank_optax.training needs flax: pip install 'lowrank_optax[flax]'."
    ) from error


class TrainState(train_state.TrainState):
    """A `flax.training.train_state.TrainState` whose ``apply_gradients`` passes extras to ``tx``.

    Attributes:
      step: number of steps taken.
      apply_fn: the model's ``apply``, which this class does not call.
      params: the parameters, a pytree.
      tx: the optimizer, any optax transformation.
      opt_state: the state of ``tx``.

    Cost: that of ``tx``, with one copy of the parameters.

    Source: flax's class of that name.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> from lowrank_optax.training import TrainState
      >>> tx = lro.soap_muon(1e-2)
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx)
      >>> grads = {"w": jnp.ones(3)}
      >>> state = state.apply_gradients(grads=grads, value_fn=lambda p: jnp.sum(p["w"] ** 2))
      >>> int(state.step)
      1
    """

    def apply_gradients(self, *, grads: Any, replace: dict[str, Any] | None = None, **extra: Any):
        """Takes one step of ``tx`` on gradients.

        Args:
          grads: the gradients, shaped like the parameters.
          replace: further fields of the state to replace, such as ``batch_stats``, by name. Flax
            takes these as keywords, which here are the optimizer's.
          **extra: extra arguments of ``tx.update``, such as ``value_fn``; unknown ones are ignored.

        Returns:
          The state after the step.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **(replace or {})
        )
