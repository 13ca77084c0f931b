"""One step from its first gradients to the base optimizer's, what it needs to be set, and what outlives it."""
