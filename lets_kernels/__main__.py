"""``python -m lets_kernels``: what runs here and why; ``methods``: all methods; ``demo``: train on real data;
``bench``: what a step costs here, against other code that takes the same step, in two minutes.
"""

import argparse
import sys

import torch

import lets_kernels
from lets_kernels import ops
from lets_kernels.methods import catalogue


def _report() -> None:
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


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m lets_kernels", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["backends", "methods", "demo", "bench"], default="backends")
    options = parser.parse_args(arguments[:1])
    if options.command == "demo":
        from lets_kernels.demo import cli as demo

        return demo.main(arguments[1:])
    if options.command == "bench":
        from lets_kernels.bench import cli as bench

        return bench.main(arguments[1:])
    if arguments[1:]:
        parser.error(f"unrecognized arguments: {' '.join(arguments[1:])}")
    if options.command == "methods":
        print(catalogue.text())
    else:
        _report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
