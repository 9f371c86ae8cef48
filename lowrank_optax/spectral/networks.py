"""Flax modules for functions of a point; any other module or pair of functions will do as well."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import as_size, check
from lowrank_optax.spectral.operators import SampledOperator


def softplus(x: jax.Array) -> jax.Array:
    """The function ``log(1 + e^x)``, as `jax.nn.softplus`, in a form that pickles."""
    return nn.softplus(x)


def tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent, as `jax.numpy.tanh`, in a form that pickles."""
    return jnp.tanh(x)


class ScaleFeatures(nn.Module):
    r"""Coordinates on several scales, bounded whatever the size of the domain, and waves of them.

    .. math:: c = \big(x_i / \sqrt{s^2 + |x|^2},\; |x| / \sqrt{s^2 + |x|^2}\big)_{i, s}, \qquad
              \sin \omega^T c,\; \cos \omega^T c, \quad \omega \sim N(0, frequency^2)

    The features of ``|x|`` have the kink at the origin that singular potentials ask for. On a line
    the second derivative of a kink is a point mass that samples never see, and operators of second
    order are not self-adjoint on such functions; `fit` refuses the kink there. Without the waves,
    networks start out nearly constant and their modes all alike.

    Attributes:
      scales: the lengths ``s``, in units of the coordinates, by default powers of 2 from 0.5 to 32.
      kink: whether the features of ``|x|`` are among them; ``True`` by default.
      waves: number of frequencies, 128 by default.
      frequency: standard deviation of the frequencies, 1 by default; ``c`` has no unit.
      seed: seed of the frequencies, 0 by default.

    Cost: ``waves * S (d + 1)`` products a point for ``S`` scales.

    Source: the waves are those of Tancik et al., "Fourier features let networks learn high
    frequency functions in low dimensional domains", NeurIPS 2020.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> features = spectral.networks.ScaleFeatures(scales=(1.0, 2.0), waves=4)
      >>> features.apply({}, jnp.ones(3)).shape  # 2 (3 + 1) coordinates, 4 sines, 4 cosines
      (16,)
    """

    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    kink: bool = True
    waves: int = 128
    frequency: float = 1.0
    seed: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        square = jnp.sum(x**2)
        rows = jnp.concatenate([x, _length(square)[None]]) if self.kink else x
        s = jnp.asarray(self.scales)[:, None]
        scaled = (rows[None] / jnp.sqrt(s**2 + square)).ravel()
        waves = FourierFeatures(self.waves, self.frequency, self.seed)
        return jnp.concatenate([scaled, waves(scaled)])


class FourierFeatures(nn.Module):
    """Sines and cosines of random frequencies, fixed by their seed.

    Attributes:
      count: number of frequencies, 256 by default.
      scale: standard deviation of the angular frequencies, in inverse units of the coordinates, 1
        by default.
      seed: seed of the frequencies, 0 by default.
      kink: whether ``x`` and ``|x|`` join them, as in `ScaleFeatures`; ``False`` by default.

    Cost: ``count * d`` products a point.

    Source: Tancik et al., "Fourier features let networks learn high frequency functions in low
    dimensional domains", NeurIPS 2020.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> spectral.networks.FourierFeatures(count=4).apply({}, jnp.ones(3)).shape
      (8,)
    """

    count: int = 256
    scale: float = 1.0
    seed: int = 0
    kink: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.count, x.shape[-1])
        phase = self.scale * jax.random.normal(jax.random.key(self.seed), shape) @ x
        waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)])
        if not self.kink:
            return waves
        return jnp.concatenate([waves, x, _length(jnp.sum(x**2))[None]])


class Envelope(nn.Module):
    """A factor ``e^{-|x| / s}`` for every mode, with a trainable length ``s``.

    Attributes:
      modes: number of modes, ``L``.
      scale: first value of ``s``, in units of the coordinates, 1 by default.

    Cost: ``2 L`` exponentials a point.

    Source: elementary.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> envelope = spectral.networks.Envelope(modes=2)
      >>> params = envelope.init(jax.random.key(0), jnp.zeros(3))
      >>> print(envelope.apply(params, jnp.zeros(3)).round())
      [1. 1.]
    """

    modes: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.constant(jnp.log(self.scale))
        log = self.param("log_scale", start, (self.modes,))
        return jnp.exp(-_length(jnp.sum(x**2)) * jnp.exp(-log))


class MLP(nn.Module):
    """A multilayer perceptron of one point: ``(d,) -> (L,)``.

    Attributes:
      modes: number of modes, ``L``.
      widths: widths of the hidden layers, three of 64 by default.
      activation: function between layers, by default `softplus`; differential operators need one
        that is twice differentiable. `softplus` and `tanh` of this module pickle; those of `jax.nn`
        are compiled functions, which do not.
      features: a module before the first layer, or ``None``, the default.
      shared: whether one trunk serves all modes; otherwise, by default, every mode has a network of
        its own, all in one batched product.
      envelope: a module of factors ``(L,)``, or ``None``, the default.

    Cost: ``2 w²`` flops a point for every hidden layer of width ``w``, and for every mode unless
    shared.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024 (one softplus network a mode).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> network = spectral.networks.MLP(modes=3, widths=(8,))
      >>> shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(2))
      >>> jax.eval_shape(network.apply, shapes, jnp.zeros(2)).shape
      (3,)
    """

    modes: int
    widths: tuple[int, ...] = (64, 64, 64)
    activation: Callable[[jax.Array], jax.Array] = softplus
    features: nn.Module | None = None
    shared: bool = False
    envelope: nn.Module | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.atleast_1d(x) if self.features is None else self.features(x)
        if self.shared:
            out = Trunk(self.widths, self.modes, self.activation)(h)
        else:
            many = nn.vmap(
                Trunk,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,  # pyright: ignore[reportArgumentType]
                axis_size=self.modes,
            )
            out = many(self.widths, 1, self.activation)(h)[:, 0]
        return out if self.envelope is None else out * self.envelope(x)


class Table(nn.Module):
    """Functions of an index that are free at every one: a row of numbers for each.

    Attributes:
      size: number of indices.
      modes: number of modes, ``L``.

    Cost: ``size * L`` parameters.

    Source: elementary.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> table = spectral.networks.Table(size=5, modes=2)
      >>> params = table.init(jax.random.key(0), 0)
      >>> table.apply(params, 3).shape
      (2,)
    """

    size: int
    modes: int

    @nn.compact
    def __call__(self, index: Any) -> Any:
        rows = self.param("rows", nn.initializers.normal(1.0), (self.size, self.modes))
        return rows[index]


def default(operator: SampledOperator, modes: int, shared: bool = False) -> Any:
    r"""What `fit` takes for a number of modes; a pair for an operator with two sides.

    .. math:: MLP(ScaleFeatures(s = 2\rho, \rho, \dots, \rho / 32),\; kink = [d > 1],\; tanh),
              \qquad \rho = \text{the power of two nearest } \sqrt{E[x_i^2]}

    so that the network follows the operator's points, whatever their unit.

    Many modes are learned in far less time by one trunk under ``VariationalEnergy(floor=0.01)``,
    with whitening (`scale_by_lre` of a `Covariance`) in front of Adam. `Decomposition` reads
    the modes off the span.

    Where points are indices it is a `Table`.

    Args:
      operator: an operator whose points are vectors ``(d,)`` or indices.
      modes: number of modes, ``L``.
      shared: whether one trunk of three layers of 128 serves all modes; otherwise, by default,
        every mode has a perceptron of its own with three layers of 64.

    Returns:
      The network, or a network for each side.

    Raises:
      ValueError: for a number of modes below 1, or points of another kind.

    Cost: one batch of 1024 points.

    Example:
      >>> from lowrank_optax import spectral
      >>> well = spectral.operators.Langevin(
      ...     spectral.operators.DoubleWell(), spectral.operators.gaussian(1, 1.0))
      >>> spectral.networks.default(well, 2).features.scales
      (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
    """
    modes = as_size("fit", "network", modes)
    if operator.indices is not None:
        # A mode that the operator prepends is none of the network's.
        tables = tuple(Table(size, modes) for size in operator.indices)
        return tables if operator.sides == 2 else tables[0]
    draw = jax.jit(lambda key: operator.points(operator.sample(key, 1024, operator.init())))
    networks = tuple(_fitting(points, modes, shared) for points in draw(jax.random.key(0)))
    return networks if operator.sides == 2 else networks[0]


def _fitting(points: Any, modes: int, shared: bool) -> MLP:
    check(
        isinstance(points, jax.Array)
        and points.ndim == 2
        and jnp.issubdtype(points.dtype, jnp.floating),
        "fit: a number of modes came for network, and the operator's points are not vectors; pass "
        "a flax module or a pair (init, apply).",
    )
    size = math.sqrt(float(jnp.mean(points**2)))
    unit = 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0
    scales = tuple(unit * 2.0**k for k in range(1, -6, -1))
    features = ScaleFeatures(scales, kink=points.shape[1] > 1)
    widths = (128 if shared else 64,) * 3
    return MLP(modes, widths, tanh, features, shared)


class Trunk(nn.Module):
    """Dense layers with an activation between them.

    Attributes:
      widths: widths of the hidden layers.
      outputs: width of the last layer.
      activation: function between layers.
    """

    widths: tuple[int, ...]
    outputs: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        for width in self.widths:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


def _length(square: jax.Array) -> jax.Array:
    """``|x|``, with finite derivatives at the origin."""
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny ** 0.5))
