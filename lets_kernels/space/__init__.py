"""The flattened parameter space: buckets, runs, this rank's parts of parameters, and the scalars that cross ranks."""
