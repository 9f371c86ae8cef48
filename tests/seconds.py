"""Writes `seconds.json`, by which the quick set of tests is chosen, from reports of runs.

python -m pytest -n 2 -m "" --junitxml=report.xml
python tests/seconds.py report.xml

What the reports do not have stays as it is, where its file is still there.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOOR = 0.3
"""Tests of fewer seconds are not listed: they are always part of the quick set."""


def main() -> None:
    path, seconds = Path(__file__).with_name("seconds.json"), defaultdict(list)
    for report in sys.argv[1:]:
        for case in ElementTree.parse(report).iter("testcase"):
            name = test_of(case.get("classname", ""), case.get("name", ""))
            seconds[name].append(float(case.get("time", 0)))
    means = {name: round(sum(each) / len(each), 2) for name, each in seconds.items()}
    means = json.loads(path.read_text()) | means
    there = lambda name: (ROOT / name.partition("::")[0]).exists()
    kept = {name: x for name, x in sorted(means.items()) if x >= FLOOR and there(name)}
    path.write_text(json.dumps(kept, indent=0) + "\n")


def test_of(where: str, name: str) -> str:
    """The test's name as pytest writes it, without its case."""
    parts = where.split(".")
    for end in range(len(parts), 0, -1):
        folder = Path(*parts[:end])
        for suffix, inside in ((".py", parts[end:]), (".md", parts[end + 1 :])):
            path = folder.with_suffix(suffix)
            if (ROOT / path).is_file():
                return "::".join([path.as_posix(), *inside, name.partition("[")[0]])
    return f"{where}::{name}"


if __name__ == "__main__":
    main()
