"""Trainer backends behind `asyncrl.trainer.backend.make_trainer`. Importing this package imports no torch."""
