"""The base optimizer within ours: its step, fused or its own, and its state."""
