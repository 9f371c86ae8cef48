"""The command line: ``python -m lowrank_optax``."""

import argparse
import sys
from collections.abc import Sequence

from lowrank_optax.demo import spectrum, train
from lowrank_optax.demo.command import Refusal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a refusal, 130 after Ctrl-C."""
    parser = _Parser(prog="python -m lowrank_optax", description="Low-rank eigenbasis optimizers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train.add(commands)
    spectrum.add(commands)
    args = parser.parse_args(argv)
    try:
        return args.command(args)
    except Refusal as refusal:
        print(f"{parser.prog}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
