"""Nonlinear least squares: fits, physics-informed networks, wavefunctions."""

from lowrank_optax.least_squares.marquardt import LevenbergMarquardtState, levenberg_marquardt

__all__ = ["LevenbergMarquardtState", "levenberg_marquardt"]
