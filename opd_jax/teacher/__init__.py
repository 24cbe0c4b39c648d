"""Scoring stored responses with a teacher, and the consistency check."""
