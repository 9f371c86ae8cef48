"""The networks that the benchmarks train, as flax modules."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


class Perceptron(nn.Module):
    """Dense layers with an activation between them: ``(examples, features)`` to the last width."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class ConvNet(nn.Module):
    """3×3 convolutions of stride 2, then two dense layers.

    A convolution is written as a product with shifted slices: on a CPU, XLA runs its own
    convolutions ten times slower inside a loop such as `jax.lax.scan`.
    """

    channels: tuple[int, ...]
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        for channels in self.channels:
            height, width = x.shape[1:3]
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifts = [(i, j) for i in range(3) for j in range(3)]
            patches = [x[:, i : i + height : 2, j : j + width : 2] for i, j in shifts]
            x = nn.relu(nn.Dense(channels)(jnp.concatenate(patches, -1)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


class CharTransformer(nn.Module):
    """A causal transformer with normalisation before each block; characters to their logits."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(self.vocabulary, self.width)(x) + positions[: x.shape[1]]
        for _ in range(self.layers):
            x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))
