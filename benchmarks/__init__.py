"""Benchmarks, one file a question; `make bench`. Each validates before it times."""
