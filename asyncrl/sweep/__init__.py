"""Runs a config over a grid of settings and seeds, and writes a table and a plot of the results."""

from asyncrl.sweep.sweep import Sweep, SweepResult, run_sweep

__all__ = ["Sweep", "SweepResult", "run_sweep"]
