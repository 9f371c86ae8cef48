"""The interface of scikit-learn."""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from lowrank_optax._core.checks import check
from lowrank_optax.spectral.decomposition import Decomposition
from lowrank_optax.spectral.fit import fit
from lowrank_optax.spectral.methods import Method
from lowrank_optax.spectral.operators import SampledOperator


class SpectralEmbedding(TransformerMixin, BaseEstimator):
    """Eigenfunctions of an operator made from data, as features of new points.

    Args:
      operator: a function from data ``(n, d)`` to an operator whose points are rows, such as
        ``lambda X: KernelIntegral(kernel, X)``, or ``lambda X: Koopman(X[:-1], X[1:])``.
      n_components: number of modes, where ``network`` is not given, 2 by default.
      network: the network, as for `fit`, by default `networks.default`.
      method: the method, as for `fit`.
      optimizer: the optimizer, as for `fit`.
      steps: number of training steps, found by default, as for `fit`.
      batch_size: number of points in a batch, 512 by default.
      random_state: seed of the fit, as in scikit-learn: a number, 0 by default; a
        ``numpy.random.RandomState`` or ``numpy.random.Generator`` to draw it from; or ``None`` to
        draw it from numpy's own.

    Attributes:
      decomposition_: the `Decomposition`.
      eigenvalues_: the eigenvalues, ``(L,)``.
      errors_: standard errors of the eigenvalues, ``(L,)``.

    Raises:
      ValueError: by ``fit``, for an operator that is not a function of the data, or a
        ``random_state`` of another kind.

    A fitted estimator pickles where its functions do: ``operator``, a kernel and the like have to
    be functions of a module, not lambdas.

    Cost: that of `fit`.

    Source: scikit-learn's interface of transformers.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax import spectral
      >>> kernel = lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2))
      >>> model = spectral.estimator.SpectralEmbedding(
      ...     lambda X: spectral.operators.KernelIntegral(kernel, X),
      ...     network=spectral.networks.MLP(2, (8,)), steps=5)
      >>> model.fit_transform(np.random.default_rng(0).normal(size=(64, 3))).shape
      (64, 2)
    """

    def __init__(
        self,
        operator: Callable[[np.ndarray], SampledOperator],
        n_components: int = 2,
        *,
        network: Any = None,
        method: Method | None = None,
        optimizer: optax.GradientTransformation | None = None,
        steps: int | None = None,
        batch_size: int = 512,
        random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    ):
        self.operator = operator
        self.n_components = n_components
        self.network = network
        self.method = method
        self.optimizer = optimizer
        self.steps = steps
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "SpectralEmbedding":
        """Learns the modes from data ``(n, d)``; ``y`` is not used."""
        X = validate_data(self, X, dtype=np.float32)
        check(callable(self.operator), "SpectralEmbedding: pass operator, a function of the data.")
        self.decomposition_: Decomposition = fit(
            self.operator(X),
            self.n_components if self.network is None else self.network,
            method=self.method,
            optimizer=self.optimizer,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=_seed(self.random_state),
        )
        self.eigenvalues_ = self.decomposition_.eigenvalues
        self.errors_ = self.decomposition_.errors
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The modes at data ``(n, d)``: ``(n, L)``."""
        check_is_fitted(self)
        return self.decomposition_(validate_data(self, X, dtype=np.float32, reset=False))

    def score(self, X: Any, y: Any = None) -> float:
        """How much of the operator of other data the modes explain, for cross-validation.

        The ``score`` of `Decomposition.read_on`, in units of the squared eigenvalues. It falls
        when modes were learned by heart, so that `sklearn.model_selection` can choose their number
        or a regularisation.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        return self.decomposition_.read_on(self.operator(X)).score


def _seed(random_state: Any) -> int:
    """The seed that a ``random_state`` stands for; a generator draws a new one every time."""
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, numbers.Integral):
        return int(random_state)
    check(
        random_state is None or isinstance(random_state, np.random.RandomState),
        f"SpectralEmbedding: random_state is {random_state!r}; pass a number, a "
        "numpy.random.RandomState, a numpy.random.Generator, or None.",
    )
    return int(check_random_state(random_state).randint(2**31 - 1))
