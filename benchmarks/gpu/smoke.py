"""Every op once on small tensors, on every backend, against float64: what a device is asked before the tests."""

import torch

from benchmarks.gpu.ops import check_all
from benchmarks.gpu.worker import Work, main


@torch.no_grad()
def run(work: Work) -> None:
    check_all(work)


if __name__ == "__main__":
    main(run, __doc__)
