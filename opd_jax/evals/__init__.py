"""Graders and accuracy estimates."""
