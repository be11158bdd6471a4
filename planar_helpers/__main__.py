"""The command line: python -m planar_helpers train | evaluate | sweep.

Exit codes: 0 done; 1 something was missing or could not be written; 2 a bad argument; 130, 143 and 129 stopped by
Ctrl-C, SIGTERM and SIGHUP (128 + the signal's number): the same command goes on from the last epoch.
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys
from ast import literal_eval
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

HELP = {
    "data": "mnist, digits (embedded, small), or auto",
    "family": "of q: planar, or a control: translation (w = 0), gaussian (full covariance, K = 0)",
    "K": "number of planar steps",
    "constraint": "whose û: shifted or paper",
    "D": "latent dimensions",
    "hidden": "units of the hidden layers, such as 500 or 500x500",
    "dropout": "share of pixels that the encoder does not see while it trains",
    "epochs": "passes over the training images",
    "batch_size": "images a step",
    "lr": "Adam's step size",
    "weight_decay": "Adam's weight decay",
    "schedule": "of the step size: constant, or cosine (to 0)",
    "clip": "largest norm of the gradient, or none",
    "warmup": "epochs in which the KL's weight rises to 1",
    "binarise": "yes: binary pixels, drawn anew at each step",
    "decoder": "name of a run whose decoder is taken and not trained; {seed} in it stands for the seed",
    "seed": "of the weights and of everything drawn",
}
ABOUT = {
    "train": "Train one planar-flow VAE, and write its history. A training that was interrupted goes on.",
    "evaluate": "Train one, if that is not done, measure it on the test images, and print and write what was found.",
    "sweep": "As train (with --test: as evaluate) for each combination of the values given, on all cores or a cluster.",
}


class OneLine(argparse.ArgumentParser):
    """Says in one line what is wrong, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def values(text: str) -> list[Any]:
    """Return the values that an option lists: "0,3,16", "0-4" for five seeds, "500x500" for two layers, words."""
    found: list[Any] = []
    for word in text.split(","):
        if ends := re.fullmatch(r"(\d+)-(\d+)", word):
            found.extend(range(int(ends[1]), int(ends[2]) + 1))
        elif re.fullmatch(r"\d+(x\d+)+", word):
            found.append(tuple(map(int, word.split("x"))))
        else:
            try:
                found.append({"yes": True, "no": False, "none": None}[word] if word.isalpha() else literal_eval(word))
            except (KeyError, ValueError, SyntaxError):
                found.append(word)  # refused later, with what was expected, unless it is a setting's own word
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is wrong with it is said in one line, with exit code 2."""
    from planar_helpers import sweep  # PyTorch takes seconds: by then `stop_on_signals` is there

    parser = OneLine(prog="python -m planar_helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(ABOUT))
    for command, about in ABOUT.items():
        one = commands.add_parser(command, help=about, description=about)
        for name, help_text in HELP.items():
            default = sweep.DEFAULTS[name]
            one.add_argument(
                f"--{name.replace('_', '-')}", dest=name, metavar="VALUES" if command == "sweep" else "VALUE",
                help=f"{help_text} (default {'no' if default is False else 'none' if default is None else default})",
            )  # fmt: skip
        if command == "sweep":
            one.add_argument("--test", action="store_true", help="measure each run on the test images, too")
            one.add_argument("--jobs", type=int, default=-1, help="runs at a time (default -1: one a core)")
            one.add_argument(
                "--plan", type=Path, help="file with such options in each line: all its runs are one sweep"
            )
            one.add_argument("--scheduler", help="address of a Dask scheduler, such as tcp://host:8786")
    arguments = parser.parse_args(words)
    try:
        arguments.runs = sweep.combinations(
            {name: values(text) for name in HELP if (text := getattr(arguments, name)) is not None}
        )
        if getattr(arguments, "plan", None):
            planned = [
                parse(["sweep", *shlex.split(line)])
                for line in arguments.plan.read_text(encoding="utf-8").splitlines()
                if line.startswith("--")
            ]
            arguments.runs = sorted((run for one in planned for run in one.runs), key=lambda run: run["seed"])
            arguments.test |= any(one.test for one in planned)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if arguments.command != "sweep" and len(arguments.runs) > 1:
        parser.error(f"{arguments.command} makes one run, and these are {len(arguments.runs)}: use sweep")
    if arguments.command == "sweep" and arguments.jobs < 1 and arguments.jobs != -1:
        parser.error(f"--jobs must be at least 1, or -1 for all cores, got {arguments.jobs}")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    from planar_helpers import sweep

    arguments = parse(words)
    try:
        if arguments.command == "sweep":
            sweep.sweep(arguments.runs, arguments.test, arguments.jobs, arguments.scheduler)
        else:
            path = sweep.run(arguments.runs[0], on_test=arguments.command == "evaluate", progress=True)
            print(json.dumps(sweep.read(path).get("results", {}), indent=1), path, sep="\n")
    except (OSError, ValueError, ImportError, BrokenExecutor) as error:  # the last: a process of the sweep was killed
        print("python -m planar_helpers:", str(error).partition("\n")[0], file=sys.stderr)
        return 1
    return 0


def stop_on_signals(program: str) -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP say so in one line, and leave with 128 + their number; twice leaves at once."""

    def stop(number: int, _: Any) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{program}: stopped by {signal.Signals(number).name}: run it again to go on\n".encode())
        raise SystemExit(128 + number)

    # Windows has no SIGHUP, nohup ignores it
    for number in [n for n in {1, 2, 15} & {*signal.valid_signals()} if signal.getsignal(n) != signal.SIG_IGN]:
        signal.signal(number, stop)


if __name__ == "__main__":
    stop_on_signals("python -m planar_helpers")
    sys.exit(main())
