"""One step, from its first gradients to the base optimizer's step; the settings it needs, and what is kept after it."""
