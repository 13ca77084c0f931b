"""Every line of docs/methods.md on the same tasks: gradients, time, accuracy. ``make compare``."""
