"""``python -m benchmarks.experiments``."""

import sys

from benchmarks.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
