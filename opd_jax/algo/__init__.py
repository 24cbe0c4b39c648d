"""Token log-probs, losses and diagnostics: pure functions on arrays."""
