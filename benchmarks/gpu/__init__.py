"""What `benchmarks/gpu_check.py` measures on a GPU. Each step is a module: `python3 -m benchmarks.gpu.ops --help`."""
