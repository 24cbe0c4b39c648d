"""What every other room stands on: mesh, randomness, trees, metrics, progress, lineage."""
