"""Training a reward model from preference pairs, after Bradley and Terry."""
