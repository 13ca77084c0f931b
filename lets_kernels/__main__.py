"""``lets-kernels``, or ``python -m lets_kernels``: info, methods, demo, bench, experiment, sharpness."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

import lets_kernels
from lets_kernels import ops
from lets_kernels.methods import catalogue


def _info() -> None:
    print(f"lets_kernels {lets_kernels.__version__}, torch {torch.__version__}")
    for name, reason in lets_kernels.backends().items():
        print(f"  {name:<10} {reason}")
    devices = [("the CPU", torch.device("cpu"))]
    for index in range(torch.cuda.device_count()):
        devices.append((f"cuda:{index} ({torch.cuda.get_device_name(index)})", torch.device("cuda", index)))
    for name, device in devices:
        chosen, _ = ops.choose("auto", device)
        print(f"Parameters on {name} run on: {chosen}")
        for better in ops.automatic(device):
            if better == chosen:
                break
            print(f"  not on {better}: {ops.refusal(better, device)}")


def _demo(arguments: list[str]) -> int:
    from lets_kernels.demo import cli

    return cli.main(arguments)


def _bench(arguments: list[str]) -> int:
    from lets_kernels.bench import cli

    return cli.main(arguments)


def _sharpness(arguments: list[str]) -> int:
    from lets_kernels.sharpness import cli

    return cli.main(arguments)


def _experiment(arguments: list[str]) -> int:
    from lets_kernels.experiment import cli

    return cli.main(arguments)


#: Commands with options of their own, which ``--help`` after the command shows; they are imported when asked for.
_PROGRAMS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "demo": (_demo, "train a small network with many radii, and draw what comes of it"),
    "bench": (_bench, "what a step costs here, against other code that takes the same step"),
    "experiment": (_experiment, "the papers' experiments: each a named recipe, on your data, resumable"),
    "sharpness": (_sharpness, "how sharp a minimum is: yours, or the demo's networks by the optimizer that found them"),
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="lets-kernels",
        description="Sharpness-aware training for PyTorch. Without a command: info.",
        epilog="The same as a module: python -m lets_kernels COMMAND",
    )
    parser.add_argument("--version", action="version", version=f"lets_kernels {lets_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="which kernels run here, and why others do not")
    listed = commands.add_parser(
        "methods",
        help="all methods: what they are made of, what they cost, whose their defaults are",
        description="Prints the two tables of docs/methods.md, in Markdown; or what they say of the methods named.",
        epilog="N: the bytes of all parameters in float32. Example: lets-kernels methods gsam friendly-sam",
    )
    listed.add_argument("names", nargs="*", metavar="NAME", help="in small letters with hyphens, such as r-sam")
    for name, (_, what) in _PROGRAMS.items():
        commands.add_parser(name, help=what, add_help=False)
    known = arguments[:1] if arguments[:1] and arguments[0] in _PROGRAMS else arguments
    options = parser.parse_args(known)
    command = options.command
    if command in _PROGRAMS:
        return _PROGRAMS[command][0](arguments[1:])
    if command == "methods":
        try:
            print("\n\n".join(map(catalogue.described, options.names)) or catalogue.text())
        except ValueError as error:
            listed.error(str(error))
    else:
        _info()
    return 0


def run() -> int:
    """:func:`main` as a program: quiet if whoever reads its output has seen enough (``lets-kernels info | head``)."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1
    return status


if __name__ == "__main__":
    sys.exit(run())
