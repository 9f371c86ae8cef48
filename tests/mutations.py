"""Breaks a line of the package, one after another, and shows which tests notice.

    python tests/mutations.py [--long] [--only 3,7] [--jobs 2]

Works on a copy. Of each mutation it runs the tests of the files named beside it, then all other
quick ones, and stops at the first that fails; with ``--long`` the long set follows where the quick
one noticed nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

MUTATIONS = [
    # engine
    ("engine/step.py", "moved = seen.due & ~failed", "moved = seen.due", "faults contract"),
    ("engine/step.py", "taken = accept & fine", "taken = accept", "faults inner"),
    (
        "engine/step.py",
        "accept = jnp.isfinite(square) & (square > 0)",
        "accept = square > 0",
        "contract faults",
    ),
    ("engine/vectors.py", "correction.weights is None\n", "True\n", "contract curvature"),
    (
        "engine/space.py",
        "jnp.sum(c**2 * live[:, None]",
        "jnp.sum(c * live[:, None]",
        "engine tools",
    ),
    # bases
    ("basis/ggt.py", "state.head - 1 -", "state.head -", "algebra window"),
    ("basis/_ring.py", "jnp.abs(weights)", "weights", "algebra window"),
    ("_core/linalg.py", "return 1.5 * t - 0.5 *", "return 1.4 * t - 0.4 *", "algebra trackers"),
    # curvatures
    (
        "curvature/quasi_newton.py",
        "jnp.where(yby <= 0, 0, self.alpha**2 - 1)",
        "jnp.where(yby <= 0, 0, self.alpha - 1)",
        "curvature",
    ),
    (
        "curvature/covariance.py",
        "weights=jnp.where(evidence.due[:, None], 0, state.weights)",
        "weights=state.weights",
        "curvature engine",
    ),
    (
        "curvature/hessian.py",
        "return self.root_mean_square(state) ** 2",
        "return self.root_mean_square(state)",
        "curvature",
    ),
    # inner parts
    ("inner/shaping.py", "mask = (u * context.g > 0)", "mask = (u * context.g >= 0)", "inner"),
    (
        "inner/shaping.py",
        "second = average(state.second, u * u, self.b2, count)",
        "second = average(state.second, jnp.abs(u), self.b2, count)",
        "kronecker inner",
    ),
    (
        "inner/newton.py",
        "fisher = jnp.where(context.moved, linalg.safe_divide(total, weight), state)",
        "fisher = linalg.safe_divide(total, weight)",
        "inner recipes",
    ),
    # matrices
    (
        "engine/spikes.py",
        "rest = mix(rest, outer / count / (d - r))",
        "rest = mix(rest, outer / count)",
        "kronecker",
    ),
    ("engine/spikes.py", "along + least[:, None]", "along", "kronecker"),
    (
        "engine/orthogonal.py",
        "bound = 1.01 * jnp.where",
        "bound = 0.51 * jnp.where",
        "kronecker matrix",
    ),
    (
        "engine/matrix_space.py",
        "share = share * stayed(",
        "share = stayed(",
        "matrix",
    ),
    # learner and fit
    (
        "online/learner.py",
        "h=linalg.symmetrize(c @ h @ c.T)",
        "h=linalg.symmetrize(h)",
        "online online_trackers",
    ),
    ("spectral/_reading.py", "np.sqrt((count - 1) *", "np.sqrt(", "spectral_fit spectral_honest"),
]
"""File, what stands there once, what takes its place, and where a test is likely."""


def main() -> None:
    args = arguments()
    rows = []
    for number in args.only or range(len(MUTATIONS)):
        name, old, new, where = MUTATIONS[number]
        noticed = tried(args, name, old, new, where.split())
        rows.append((number, name, new.strip(), noticed))
        print("{:2d}  {:26s} {:58s} {}".format(*rows[-1]), flush=True)
    quick = sum(row[3].startswith("quick") for row in rows)
    print(f"{quick} of {len(rows)} are noticed by the quick set")


def tried(args: argparse.Namespace, name: str, old: str, new: str, where: list[str]) -> str:
    """Which set of tests noticed, and the first test that did."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        leave = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "results", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=leave)
        file = copy / "lowrank_optax" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
        file.write_text(text.replace(old, new))
        near = [f"tests/test_{each}.py" for each in where]
        sets = [("quick, near", "not long", near), ("quick", "not long", ["tests"])]
        sets += [("long", "long", ["tests"])] if args.long else []
        for title, chosen, paths in sets:
            failed = first_failure(copy, chosen, paths, args.jobs)
            if failed:
                return f"{title}: {failed}"
    return "nobody"


def first_failure(copy: Path, chosen: str, paths: list[str], jobs: int) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", str(jobs), "-m", chosen, *paths]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode in (0, 5):  # 5: there are no such tests
        return ""
    lines = [x for x in run.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"exit {run.returncode}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="the long set too")
    parser.add_argument("--only", type=lambda x: [int(i) for i in x.split(",")])
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
