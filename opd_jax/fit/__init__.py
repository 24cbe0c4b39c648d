"""Compiling for devices that are not here: does it compile, and does it fit."""
