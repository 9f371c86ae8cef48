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


class VisionTransformer(nn.Module):
    """Square patches as tokens, blocks with normalisation before, the mean token to classes."""

    patch: int
    width: int
    layers: int
    heads: int
    classes: int

    @nn.compact
    def __call__(self, x):
        n, height, width, p = *x.shape[:3], self.patch
        x = x.reshape(n, height // p, p, width // p, p).transpose(0, 1, 3, 2, 4)
        x = nn.Dense(self.width, name="patches")(x.reshape(n, -1, p * p))
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


class Variational(nn.Module):
    """A variational autoencoder: pixels and noise to their logits, mean and log-variance."""

    hidden: int
    latent: int

    @nn.compact
    def __call__(self, x, noise):
        h = nn.tanh(nn.Dense(self.hidden)(x))
        mean, log_variance = jnp.split(nn.Dense(2 * self.latent)(h), 2, -1)
        h = nn.tanh(nn.Dense(self.hidden)(mean + jnp.exp(log_variance / 2) * noise))
        return nn.Dense(x.shape[-1])(h), mean, log_variance


class Picture(nn.Module):
    """Coordinates in [-1, 1] to colours: fixed sines and cosines of them, then dense layers."""

    features: int
    cycles: float
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        waves = jnp.pi * self.cycles * jax.random.normal(jax.random.key(12), (2, self.features))
        x = jnp.concatenate([jnp.sin(x @ waves), jnp.cos(x @ waves)], -1)
        return Perceptron(self.widths, nn.gelu)(x)


class Convolution(nn.Module):
    """A 3×3 convolution with a kernel of four axes, as a product with shifted slices.

    With ``depthwise``, every channel has its own kernel: ``(3, 3, 1, channels)``.
    """

    channels: int
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x):
        height, width, inputs = x.shape[1:]
        shape = (3, 3, 1 if self.depthwise else inputs, self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        s = self.stride
        shifts = [(i, j) for i in range(3) for j in range(3)]
        slices = [x[:, i : i + height : s, j : j + width : s] for i, j in shifts]
        if self.depthwise:
            pairs = zip(slices, kernel.reshape(9, self.channels), strict=True)
            return sum(piece * weight for piece, weight in pairs)
        return jnp.concatenate(slices, -1) @ kernel.reshape(-1, self.channels)


class Residual(nn.Module):
    """Blocks of a depthwise convolution and two dense layers, and strides between stages."""

    channels: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x):
        for channels in self.channels:
            x = Convolution(channels, stride=2)(x)
            y = nn.LayerNorm()(Convolution(channels, depthwise=True)(x))
            x += nn.Dense(channels)(nn.gelu(nn.Dense(4 * channels)(y)))
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class Messages(nn.Module):
    """Messages on graphs: inputs of `datasets.graphs` to one number a node."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x):
        walk, x = x[..., :-1], x[..., -1:]
        x = nn.Dense(self.width)(x)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            heard = walk @ nn.relu(nn.Dense(self.width)(y))
            y = nn.relu(nn.Dense(2 * self.width)(jnp.concatenate([y, heard], -1)))
            x += nn.Dense(self.width)(y)
        return nn.Dense(1, name="head")(nn.LayerNorm()(x))[..., 0]


class Recurrent(nn.Module):
    """Gated recurrent units over characters; to the logits of the next ones."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(self.vocabulary, self.width // 2)(x)
        x = nn.RNN(nn.GRUCell(self.width))(x)
        return nn.Dense(self.vocabulary, name="head")(x)


class TwoTowers(nn.Module):
    """Users and items, each through a table and two dense layers; the product of the two."""

    users: int
    items: int
    width: int

    @nn.compact
    def __call__(self, pairs):
        sides = []
        for i, (name, size) in enumerate((("user", self.users), ("item", self.items))):
            x = nn.Embed(size, self.width, name=f"{name}_table")(pairs[:, i])
            x = nn.relu(nn.Dense(2 * self.width, name=f"{name}_first")(x))
            sides.append(nn.Dense(self.width, name=f"{name}_second")(x))
        return jnp.sum(sides[0] * sides[1], -1) / self.width**0.5


class Denoiser(nn.Module):
    """Noise in an image at an angle between none and all, by residual blocks of dense layers."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x, angle):
        time = angle[:, None] * 2.0 ** jnp.arange(8)
        time = jnp.concatenate([jnp.sin(time), jnp.cos(time)], -1)
        size = x.shape[-1]
        x = nn.Dense(self.width)(x)
        for _ in range(self.layers):
            y = nn.silu(
                nn.Dense(2 * self.width)(nn.LayerNorm()(x)) + nn.Dense(2 * self.width)(time)
            )
            x += nn.Dense(self.width)(y)
        return nn.Dense(size, name="head")(nn.LayerNorm()(x))


class Mixture(nn.Module):
    """Small networks of which the two likeliest answer; kernels ``(experts, inputs, outputs)``."""

    experts: int

    @nn.compact
    def __call__(self, x):
        fan_in = nn.initializers.variance_scaling(1, "fan_in", "truncated_normal", batch_axis=0)
        shape = (self.experts, x.shape[-1], x.shape[-1])
        up, down = (
            self.param("experts_up", fan_in, shape),
            self.param("experts_down", fan_in, shape),
        )
        scores = nn.Dense(self.experts, use_bias=False, name="gate")(x)
        least = jax.lax.top_k(scores, 2)[0][:, 1:]
        weights = jax.nn.softmax(jnp.where(scores >= least, scores, -jnp.inf))
        hidden = nn.relu(jnp.einsum("na,eab->enb", x, up))
        return jnp.einsum("enb,ebc,ne->nc", hidden, down, weights)


class Experts(nn.Module):
    """Residual blocks of `Mixture`."""

    width: int
    layers: int
    experts: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(self.layers):
            x += Mixture(self.experts)(nn.LayerNorm()(x))
        return nn.Dense(self.outputs, name="head")(nn.LayerNorm()(x))


class Layer(nn.Module):
    """A transformer's block, as `jax.lax.scan` calls it."""

    heads: int

    @nn.compact
    def __call__(self, x, _):
        n, length, width = x.shape
        split = lambda x: x.reshape(n, length, self.heads, -1).swapaxes(1, 2)
        q, k, v = jnp.split(nn.Dense(3 * width, name="qkv")(nn.LayerNorm()(x)), 3, -1)
        scores = split(q) @ split(k).swapaxes(-1, -2) / (width // self.heads) ** 0.5
        y = (jax.nn.softmax(scores) @ split(v)).swapaxes(1, 2).reshape(x.shape)
        x += nn.Dense(width, name="attended")(y)
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(hidden), None


class Scanned(nn.Module):
    """A transformer whose layers are one leaf each, ``(layers, inputs, outputs)``, over rows."""

    width: int
    layers: int
    heads: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="rows")(x)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x = stack(self.heads, name="layers")(x, None)[0]
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))
