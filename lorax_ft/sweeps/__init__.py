"""Sweeps: many runs as one compiled program, with one copy of the base."""
