"""What a task of the optimizers' benchmark is made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from datasets import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is minimised, and what it is judged by.

    Attributes:
      init: ``key -> params``.
      data: arrays that `batch` and `measure` read; arguments of the compiled run, not constants.
      batch: ``(key, data) -> batch`` of a step.
      losses: ``(params, batch) -> (examples,)``; their mean is the loss.
      measure: ``(params, data) -> scalar``, lower is better.
      quantity: what that is.
      steps: a run's length.
      deterministic: whether all batches are the same one.
      network: whether it is a network, not a function that shows one difficulty alone.
      held_out: ``(params, data) -> scalar``, reported beside, where there is data for it.
    """

    init: Callable[[jax.Array], Any]
    data: Any
    batch: Callable[[jax.Array, Any], Any]
    losses: Callable[[Any, Any], jax.Array]
    measure: Callable[[Any, Any], jax.Array]
    quantity: str
    steps: int
    deterministic: bool = False
    network: bool = True
    held_out: Callable[[Any, Any], jax.Array] | None = None

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean loss of a batch."""
        return jnp.mean(self.losses(params, batch))


def supervised(
    model: nn.Module,
    parts: tuple[Batch, Batch],
    draw: Callable[[jax.Array, Batch], Batch],
    losses: Callable[[jax.Array, jax.Array], jax.Array],
    steps: int,
    judged: str = "train",
    most: int | None = None,
) -> Problem:
    """A network on inputs and targets.

    Args:
      model: the network.
      parts: examples to train on and held-out ones.
      draw: ``(key, training examples) -> batch`` of a step.
      losses: ``(outputs, targets) -> (examples,)``.
      steps: a run's length.
      judged: the part that the loss is measured on, "train" or "held-out".
      most: the number of examples that it is measured on; ``None`` for all.
    """
    first = lambda batch: jax.tree.map(lambda x: x[:most], batch)
    each = lambda params, batch: losses(model.apply({"params": params}, batch[0]), batch[1])
    whole = {
        "train": lambda params, data: each(params, first(data[0])).mean(),
        "held-out": lambda params, data: each(params, first(data[1])).mean(),
    }
    return Problem(
        init=lambda key: model.init(key, parts[1][0][:1])["params"],
        data=parts,
        batch=lambda key, data: draw(key, data[0]),
        losses=each,
        measure=whole[judged],
        quantity="training loss" if judged == "train" else "held-out loss",
        steps=steps,
        held_out=whole["held-out"],
    )


def minibatch(size: int) -> Callable[[jax.Array, Batch], Batch]:
    """Draws examples at random."""

    def draw(key, data):
        index = jax.random.randint(key, (size,), 0, len(data[0]))
        return data[0][index], data[1][index]

    return draw


def windows(size: int, length: int) -> Callable[[jax.Array, Batch], Batch]:
    """Draws pieces of a text, and the characters that follow."""

    def draw(key, data):
        start = jax.random.randint(key, (size, 1), 0, len(data[0]) - length)
        window = data[0][start + jnp.arange(length + 1)]
        return window[:, :-1], window[:, 1:]

    return draw


CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
