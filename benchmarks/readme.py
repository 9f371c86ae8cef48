"""Renders the tables of the README and of docs/ from the JSON in ``results``, and nothing else.

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands what the function of that name makes of
the figures on disk.

    python benchmarks/readme.py [--check]        # --check only says whether they agree
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def rows(name: str) -> list[dict[str, Any]]:
    """The summary rows of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def number(x: float | None) -> str:
    """Three significant digits, short."""
    if x is None:
        return "–"
    if 1e-3 <= abs(x) < 1e4:
        return (
            f"{x:#.3g}".rstrip(".").replace("0.", ".", 1) if abs(x) < 1 else f"{x:#.3g}".rstrip(".")
        )
    return f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def across(
    cell: Callable[[dict[str, Any]], float | None],
    spread: bool = False,
    groups: tuple[str, ...] = ("methods",),
    methods: list[str] | None = None,
) -> str:
    """Tasks down, methods across, the lowest of every task in bold; tasks where all were run."""
    found = [
        row for row in rows("optimizers") if row["group"] in groups or row["method"] == "AdamW"
    ]
    tasks = list(dict.fromkeys(row["task"] for row in found))
    methods = methods or list(dict.fromkeys(row["method"] for row in found))
    at = {(row["task"], row["method"]): row for row in found}
    lines = []
    for task in tasks:
        values = {m: cell(at[task, m]) for m in methods if (task, m) in at}
        if len(values) < 2:
            continue
        known = [v for v in values.values() if v is not None]
        line = [task]
        for method in methods:
            value = values.get(method)
            text = number(value)
            if known and value == min(known):
                text = f"**{text}**"
            if spread and value is not None:
                row = at[task, method]
                text += f" ({number(row['low'])}–{number(row['high'])})"
            line.append(text)
        lines.append(line)
    return markdown(["task", *methods], lines)


def main_job() -> str:
    """The task of the command line's default, from what that command wrote."""
    from lowrank_optax.demo.report import seconds_to

    result = json.loads((RESULTS / "main_job" / "results.json").read_text())
    best = min(row["held_out_loss"]["median"] for row in result["methods"].values())
    lines = []
    for name, row in result["methods"].items():
        loss, seconds = row["held_out_loss"]["median"], seconds_to(result, name)
        text = f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"
        cells = (
            f"`{name}`" if row["ours"] and " " not in name else name,
            f"{row['learning_rate']:g}",
        )
        tail = f"{row['ms_per_step']:.1f}", f"{row['state_bytes'] / 1e6:.1f}"
        lines.append([*cells, text, "–" if math.isnan(seconds) else f"{seconds:.1f}", *tail])
    head = ["method", "rate", "held-out loss", "seconds to AdamW's", "ms a step", "state, MB"]
    return markdown(head, lines)


def optimizers() -> str:
    """Final measures at equal steps."""
    return across(lambda row: row["final"])


def optimizers_spread() -> str:
    """The same with the range over seeds."""
    return across(lambda row: row["final"], spread=True)


def optimizers_seconds() -> str:
    """Seconds to AdamW's final result."""
    return across(lambda row: row.get("seconds"))


def optimizers_time() -> str:
    """Milliseconds a step."""
    return across(lambda row: row.get("ms"))


def whitening() -> str:
    """Final measures with whitening in front of a peer over those of the peer alone."""
    found = {(row["task"], row["method"]): row for row in rows("optimizers")}
    peers = "AdamW", "Muon", "SOAP"
    lines = []
    for task in dict.fromkeys(task for task, _ in found):
        line = [task]
        for peer in peers:
            with_, alone = found.get((task, f"whitening + {peer}")), found.get((task, peer))
            line.append(f"{with_['final'] / alone['final']:.2g}" if with_ and alone else "–")
        lines.append(line)
    return markdown(["task", *(f"in front of {peer}" for peer in peers)], lines)


def guidance() -> str:
    """The recipe at its guidance's rate, seeds and all, beside the best tuned peer."""
    found = json.loads((RESULTS / "optimizers.json").read_text())["verdicts"]
    lines = []
    for row in found:
        ratio = f"{row['ratio']:.3g}"
        best = row["ratio"] <= 1
        cells = (row[name] for name in ("best_rate", "half", "twice"))
        lines.append(
            [
                row["task"] + (" (aside)" if row["aside"] else ""),
                number(row["final"]),
                f"{row['peer']} {number(row['peer_final'])}",
                f"**{ratio}**" if best else ratio,
                *(number(x) for x in cells),
            ]
        )
    head = [
        "task",
        "at the guidance",
        "best tuned peer",
        "over it",
        "best rate over the guidance",
        "half the rate over it",
        "twice the rate over it",
    ]
    return markdown(head, lines)


def widths() -> str:
    """A step by width, beside Muon's."""
    lines = []
    for row in rows("widths"):
        figures = (row[name] for name in ("ratio", "worst", "state", "compile_s"))
        line = [row["shape"], row["method"], f"{row['step_ms']:.3g}"]
        lines.append(line + [f"{x:.2f}" for x in figures])
    head = ["matrices", "method", "ms a step", "over Muon's", "worst step over the median"]
    return markdown([*head, "state over Adam's", "compilation, s"], lines)


def curvatures() -> str:
    """Final measures of Hessian and Fisher curvatures."""
    return across(lambda row: row["final"], groups=("curvatures",))


def curvatures_seconds() -> str:
    """Their seconds to AdamW's final result."""
    return across(lambda row: row.get("seconds"), groups=("curvatures",))


def matrix_shapes() -> str:
    """Matrices with bases on their sides, on the character transformer."""
    head = ["method", "rate", "held-out loss (range)", "step over Adam's", "state, kB"]
    lines = [
        [
            row["method"],
            f"{row['rate']:g}",
            f"{row['loss']} ({row['spread']})",
            f"{row['over_adam']:.2f}",
            f"{row['state_kb']:.0f}",
        ]
        for row in rows("matrix_shapes")
    ]
    return markdown(head, lines)


def least_squares() -> str:
    """Errors of least-squares problems."""
    head = ["problem", "precision", "method", "steps", "error (range)", "seconds"]
    lines = [
        [
            row["problem"],
            row["precision"],
            row["method"],
            str(row["steps"]),
            f"{number(row['error'])} ({row['spread']})",
            number(row["seconds"]),
        ]
        for row in rows("least_squares")
    ]
    return markdown(head, lines)


def pinns() -> str:
    """Relative errors of networks on seven equations."""
    lines = []
    found = rows("pinns")
    for problem in dict.fromkeys(row["problem"] for row in found):
        some = [row for row in found if row["problem"] == problem]
        for row in some:
            line = [problem, row["method"], str(row["steps"]), number(row["seconds"])]
            line.append(number(row["error"]))
            line.append(number(row["early"]) if row.get("early") else "–")
            lines.append([*line, number(row["published"]) if row["method"][:3] == "lro" else ""])
    head = ["equation", "method", "steps", "seconds", "relative L2 error"]
    return markdown([*head, "when the others ended", "published"], lines)


def least_squares_scale() -> str:
    """A step by sizes."""
    lines = [
        [
            f"{row['k']:,}",
            f"{row['d']:,}",
            row["precision"],
            str(row["products"]) if row["products"] else "one array",
            number(row["seconds"]),
            f"{row['peak_mb']:,}",
        ]
        for row in sorted(
            rows("least_squares_scale"), key=lambda r: (r["precision"], r["k"], r["d"])
        )
    ]
    head = ["residuals", "parameters", "precision", "products", "seconds a step", "peak, MB"]
    return markdown(head, lines)


def wavefunction() -> str:
    """Energies of two electrons."""
    lines = [
        [
            row["system"],
            str(row["parameters"]),
            str(row["steps"]),
            number(row["seconds"]),
            f"{row['energy']:.5f} ± {row['error']:.5f}",
            f"{row['reference']:.5f}",
        ]
        for row in rows("wavefunction")
    ]
    return markdown(["system", "parameters", "steps", "seconds", "energy", "reference"], lines)


def nist() -> str:
    """How many of NIST's 54 fits each method found, and its digits."""
    found = rows("nist")
    methods = [key for key in found[0] if key not in ("problem", "start", "steps to 6")]
    lines = []
    for method in methods:
        digits = sorted(row[method] for row in found)
        right = sum(x >= 4 for x in digits)
        lines.append(
            [method, f"{right} of {len(found)}", str(digits[0]), str(digits[len(digits) // 2])]
        )
    return markdown(["method", "found", "fewest digits", "median digits"], lines)


def milliseconds(x: float) -> str:
    """A time with three digits."""
    return f"{x:#.3g}".rstrip(".")


def step_cost() -> str:
    """A step over two passes over its rows: sizes and ranks down, bases across."""
    found = rows("step_cost")
    at = {(r["d"], r.get("rank"), r["basis"], r.get("dtype")): r for r in found}
    lines = []
    for d, rank in dict.fromkeys((r["d"], r["rank"]) for r in found if r["basis"] == "GGT"):
        line = [f"{d:.0e}".replace("e+0", "e"), str(rank)]
        for basis in ("GGT", "Eigen"):
            row = at.get((d, rank, basis, "float32"))
            cells = ("passes_ms", "step_ms", "ratio") if basis == "GGT" else ("step_ms", "ratio")
            line += [milliseconds(row[c]) if row else "–" for c in cells]
        keys = (d, None, "optax adam", None), (d, rank, "torchzero GGT", "float32")
        others = [at.get(key) for key in keys]
        lines.append(line + [milliseconds(row["step_ms"]) if row else "–" for row in others])
    head = ["d", "rank", "two passes, ms", "GGT, ms", "ratio", "Eigen, ms", "ratio"]
    head += ["optax Adam, ms", "torchzero GGT, ms"]
    return markdown(head, lines)


def step_cost_bases() -> str:
    """Every basis over two passes, and what its flop count predicts."""
    lines = [
        [f"`{row['basis']}`"] + [f"{row[k]:.2f}" if row[k] else "–" for k in ("ratio", "predicted")]
        for row in rows("step_cost_bases")
        if row.get("dtype") == "float32"
    ]
    return markdown(["basis", "step over two passes", "predicted"], lines)


def trackers() -> str:
    """Share of the energy of an offline SVD, and the time for a vector."""
    found = rows("trackers")
    at = {(row["stream"], row["tracker"]): row for row in found}
    streams = list(dict.fromkeys(row["stream"] for row in found))
    names = dict.fromkeys(row["tracker"] for row in found if row["tracker"] != "floor")
    long = [stream for stream in streams if stream not in ("spiked", "digits")]
    lines = []
    for name in names:
        spiked, digits = at["spiked", name], at["digits", name]
        line = [name, f"{spiked['energy']:.4f}", f"{digits['energy']:.4f}"]
        line += [f"{spiked['angle']:.1f}°", milliseconds(spiked["us"])]
        for stream in long:
            row = at.get((stream, name))
            line += [milliseconds(row["us"]), f"{row['floors']:.1f}"] if row else ["–", "–"]
        lines.append(
            [cell.replace("0.", ".", 1) if cell.startswith("0.") else cell for cell in line]
        )
    head = ["tracker", "spiked", "digits", "largest angle, spiked", "µs, d=500"]
    head += [cell for _ in long for cell in ("µs, d=1e5", "passes, d=1e5")]
    return markdown(head, lines)


def sweeps() -> str:
    """Many runs as one vmapped step over the same one by one: sizes down, optimizers across."""
    found = json.loads((RESULTS / "load.json").read_text())["sweeps"]
    names = list(dict.fromkeys(row["name"] for row in found))
    at = {(row["d"], row["name"]): row["ratio"] for row in found}
    sizes = dict.fromkeys(row["d"] for row in found)
    return markdown(["d", *names], [[f"{d:,}", *(number(at[d, n]) for n in names)] for d in sizes])


def compiling() -> str:
    """Seconds to compile a step: optimizers down, models of 100 leaves across."""
    found = json.loads((RESULTS / "load.json").read_text())["compiling"]
    models = list(dict.fromkeys(row["model"] for row in found))
    at = {(row["name"], row["model"]): f"{row['total']:.1f}" for row in found}
    names = dict.fromkeys(row["name"] for row in found)
    return markdown(["step of", *models], [[n, *(at[n, m] for m in models)] for n in names])


def faults() -> str:
    """What was done, how often, and how often it failed."""
    parts = json.loads((RESULTS / "faults.json").read_text())["parts"]
    lines = [
        [row["fault"], f"{row['trials']:,}", str(row["failures"])]
        for part in parts.values()
        for row in part["rows"]
    ]
    return markdown(["fault", "trials", "failures"], lines)


TABLES = {
    f.__name__: f
    for f in (
        main_job,
        step_cost,
        step_cost_bases,
        trackers,
        optimizers,
        optimizers_spread,
        optimizers_seconds,
        optimizers_time,
        whitening,
        guidance,
        widths,
        curvatures,
        curvatures_seconds,
        matrix_shapes,
        least_squares,
        pinns,
        least_squares_scale,
        wavefunction,
        nist,
        sweeps,
        compiling,
        faults,
    )
}


def render(text: str) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"no table is called {name}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    parser.add_argument("files", nargs="*", type=Path, default=PAGES)
    args = parser.parse_args()
    stale = []
    for path in args.files:
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print(f"{'out of date' if args.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    main()
