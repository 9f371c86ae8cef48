"""The optimizers that are compared, each as a function of its schedule of learning rates."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import peers

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer as a function of its learning-rate schedule, and the middle of its grid.

    Attributes:
      make: schedule to transformation.
      middle: of the grid, in the task's unit of learning rates.
      ours: whether it is one of the library's.
      above: the peer that whitening stands in front of.
      scaled: whether rates have that unit; those of Newton's methods have none.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    middle: float = 1e-2
    ours: bool = False
    above: str | None = None
    scaled: bool = True

    def centre(self, unit: float) -> float:
        """The middle of the grid on a task of that unit."""
        return self.middle * (unit if self.scaled else 1)

    def rates(self, unit: float, size: int) -> list[float]:
        """The grid, a factor √10 apart."""
        steps = range(-(size // 2), size - size // 2)
        return [float(f"{self.centre(unit) * 10 ** (k / 2):.3g}") for k in steps]

    def around(self, unit: float) -> list[float]:
        """Half the rate of a recipe's guidance (the middle of the grid), itself and twice."""
        return [float(f"{self.centre(unit) * factor:.3g}") for factor in (0.5, 1, 2)]


def muon_dimensions(params: Any) -> Any:
    """Kernels of attention and convolutions as matrices; vectors and tables stay with Adam."""
    spec = optax.contrib.MuonDimensionNumbers

    def of(path, x):
        name = jax.tree_util.keystr(path)
        if x.ndim == 4:
            return spec((0, 1, 2), (3,)) if x.shape[2] > 1 else None
        if x.ndim == 3:
            return spec((0, 1), (2,)) if "'out'" in name else spec((0,), (1, 2))
        return spec() if x.ndim == 2 and "embedding" not in name else None

    return jax.tree_util.tree_map_with_path(of, params)


def muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon with updates of Adam's size (Liu et al. 2025), as one rate serves both its parts."""
    return optax.contrib.muon(
        rate, consistent_rms=0.2, muon_weight_dimension_numbers=muon_dimensions
    )


def apart(
    make: Callable[..., optax.GradientTransformation], rate: optax.Schedule
) -> optax.GradientTransformation:
    """A peer that sees the layers and experts that are one leaf as leaves of their own.

    Published programs have no such leaves, and would take ``(layers, inputs, outputs)`` for
    something else.
    """
    tx = make(rate)

    def split(tree):
        def of(path, x):
            name = jax.tree_util.keystr(path)
            return list(x) if "'layers'" in name or "'experts_" in name else x

        return jax.tree_util.tree_map_with_path(of, tree)

    def join(tree, like):
        return jax.tree.map(
            lambda x, y: jnp.stack(y) if isinstance(y, list) else y,
            like,
            tree,
        )

    def update(updates, state, params=None, **extra):
        steps, state = tx.update(split(updates), state, split(params))
        return join(steps, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(split(params)), update)


def before(make: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    """Whitening with its one default setting in front of a peer."""
    return optax.chain(lro.whiten(), make(rate))


def sophia(rate: optax.Schedule) -> optax.GradientTransformation:
    """Sophia with Hutchinson's estimate, the Hessian's diagonal in the parameters' coordinates."""
    tx = optax.contrib.sophia(rate)

    def update(updates, state, params=None, *, value_fn, **extra):
        return tx.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def lbfgs(rate: optax.Schedule) -> optax.GradientTransformation:
    """L-BFGS with its line search, which has no rate and takes no arguments but its own."""
    tx = optax.lbfgs()

    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        return tx.update(updates, state, params, value=value, grad=grad, value_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def original(rate: optax.Schedule) -> optax.GradientTransformation:
    """The parts of the original LRE."""
    return lro.lre(rate, basis=lro.basis.GGT(100))


METHODS: dict[str, Method] = {
    "AdamW": Method(optax.adamw),
    "Muon": Method(partial(apart, muon)),
    "SOAP": Method(partial(apart, peers.soap)),
    "KL-SOAP": Method(partial(apart, peers.klsoap)),
    "PSGD-Kron": Method(partial(apart, peers.kron)),
    "whitening + AdamW": Method(partial(before, optax.adamw), ours=True, above="AdamW"),
    "whitening + Muon": Method(partial(before, muon), ours=True, above="Muon"),
    "whitening + SOAP": Method(partial(before, peers.soap), ours=True, above="SOAP"),
    "soap_muon": Method(lro.soap_muon, 1.5e-2, ours=True),
    "original LRE": Method(original, 1.0, True),
}
"""Those that every task is run with."""

CURVATURES: dict[str, Method] = {
    "L-BFGS (optax)": Method(lbfgs, scaled=False),
    "Sophia (optax)": Method(sophia),
    "BFGS": Method(lambda rate: lro.lowrank_newton(rate, rank=20), 1.0, True, scaled=False),
    "SR1": Method(
        lambda rate: lro.lowrank_newton(rate, rank=20, curvature=lro.curvature.SR1()),
        1.0,
        True,
        scaled=False,
    ),
    "AdaHessian in a subspace": Method(lambda rate: lro.adahessian(rate, rank=20), 1e-1, True),
    "Sophia-H in a subspace": Method(
        lambda rate: lro.sophia_h(rate, rank=20, complement=optax.scale_by_adam()), ours=True
    ),
    "Hessian whitening + AdamW": Method(
        lambda rate: optax.chain(
            lro.scale_by_lre(
                lro.curvature.HutchinsonHessian(),
                lro.basis.Eigen(20),
                lro.inner.LPower(-0.25),
                update_every=10,
                complement=1.0,
            ),
            optax.adamw(rate),
        ),
        ours=True,
    ),
    "natural gradient": Method(
        lambda rate: lro.natural_gradient(rate, rank=20, damping=1.0, complement=1.0), 1.0, True
    ),
}
"""Hessian and Fisher curvatures, run where they are asked for by ``--methods``."""

PEERS = tuple(name for name, method in METHODS.items() if not method.ours)

RECIPE = "soap_muon"
"""The library's recipe for networks, which its guidance's rate is judged by."""

EVERY = METHODS | CURVATURES
