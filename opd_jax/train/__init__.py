"""Optimizer, train state, train step, checkpoints and the loop."""
