"""Parts that work and are tested, but that no measurement here recommends.

The original has these curvatures, and whoever follows it finds them here. No recipe, benchmark or
notebook of this library uses one, so nothing says where they pay; they may go in a later version.
`CovarianceTimesLoss` weighs gradients by the loss, `Parameters` and `Updates` look at where the
parameters are and how they moved instead of at gradients, `UnrolledGaussNewton` follows the losses
of past steps as if they were residuals.
"""

from lowrank_optax.curvature.covariance import CovarianceTimesLoss, Parameters, Updates
from lowrank_optax.curvature.examples import UnrolledGaussNewton

__all__ = ["CovarianceTimesLoss", "Parameters", "UnrolledGaussNewton", "Updates"]
