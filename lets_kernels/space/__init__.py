"""The flattened parameter space: buckets, runs, this rank's parts of them, and the few scalars that cross ranks."""
