"""Prompts, tokenizers, the rollout store and the batches read from it."""
