"""The base optimizer inside our optimizer: its step (fused, or its own) and its state."""
