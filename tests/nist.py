"""NIST's 27 nonlinear regression problems: models, data, starting points and certified values.

Source: National Institute of Standards and Technology, Statistical Reference Datasets, "Nonlinear
Regression" (public domain). ``data/nist.json`` holds the numbers, certified to eleven digits.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

DATA = json.loads((Path(__file__).parent / "data" / "nist.json").read_text())


def saturation(b, x):
    return b[0] * (1 - jnp.exp(-b[1] * x))


def decay(b, x):
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


def decays(b, x):
    return sum(b[i] * jnp.exp(-b[i + 1] * x) for i in (0, 2, 4))


def peaks(b, x):
    peak = lambda i: b[i] * jnp.exp(-(((x - b[i + 1]) / b[i + 2]) ** 2))
    return b[0] * jnp.exp(-b[1] * x) + peak(2) + peak(5)


def cubics(b, x):
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def quadratics(b, x):
    return (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2)


def seasons(b, x):
    wave = lambda i, period: (
        b[i] * jnp.cos(2 * jnp.pi * x / period) + b[i + 1] * jnp.sin(2 * jnp.pi * x / period)
    )
    return b[0] + wave(1, 12) + wave(4, b[3]) + wave(7, b[6])


MODELS = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": saturation,
    "Chwirut1": decay,
    "Chwirut2": decay,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": seasons,
    "Eckerle4": lambda b, x: b[0] / b[1] * jnp.exp(-(((x - b[2]) / b[1]) ** 2) / 2),
    "Gauss1": peaks,
    "Gauss2": peaks,
    "Gauss3": peaks,
    "Hahn1": cubics,
    "Kirby2": quadratics,
    "Lanczos1": decays,
    "Lanczos2": decays,
    "Lanczos3": decays,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1a": saturation,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[:, 0] * jnp.exp(-b[2] * x[:, 1]),
    "Rat42": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi,
    "Thurber": cubics,
}


def observations(name):
    """``x`` and ``y``, of which Nelson's model describes the logarithm."""
    x, y = np.array(DATA[name]["x"], float), np.array(DATA[name]["y"], float)
    return x, np.log(y) if name == "Nelson" else y


def digits(found, certified):
    """Correct digits of the worst value, at most 11: those that are certified."""
    found, certified = np.asarray(found, float), np.asarray(certified, float)
    with np.errstate(divide="ignore"):
        right = -np.log10(np.abs(found / certified - 1))
    return float(np.clip(np.nan_to_num(right, nan=0.0, posinf=11.0), 0, 11).min())
