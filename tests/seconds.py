"""Writes `seconds.json`, by which the quick set of tests is chosen, from a report of a whole run.

python -m pytest -n 2 -m "long or not long" --junitxml=report.xml
python tests/seconds.py report.xml
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

FLOOR = 0.3
"""Tests of fewer seconds are not listed: they are always part of the quick set."""


def main() -> None:
    report, root = ElementTree.parse(sys.argv[1]), Path(__file__).parents[1]
    seconds: dict[str, list[float]] = defaultdict(list)
    for case in report.iter("testcase"):
        where, name = case.get("classname", ""), case.get("name", "")
        seconds[test_of(root, where, name)].append(float(case.get("time", 0)))
    means = {name: round(sum(each) / len(each), 2) for name, each in sorted(seconds.items())}
    text = json.dumps({name: x for name, x in means.items() if x >= FLOOR}, indent=0)
    Path(__file__).with_name("seconds.json").write_text(text + "\n")


def test_of(root: Path, where: str, name: str) -> str:
    """The test's name as pytest writes it, without its case."""
    parts = where.split(".")
    for end in range(len(parts), 0, -1):
        for suffix in (".py", ""):
            path = Path(*parts[:end]).with_suffix(suffix) if suffix else Path(*parts[:end])
            if (root / path).is_file():
                inside = [*parts[end:], name.partition("[")[0]]
                return "::".join([path.as_posix(), *inside])
    return f"{where}::{name}"


if __name__ == "__main__":
    main()
