"""Runs a config over a grid of settings and seeds, and makes a table and a plot of what came of it."""

from asyncrl.sweep.sweep import Sweep, SweepResult, run_sweep

__all__ = ["Sweep", "SweepResult", "run_sweep"]
