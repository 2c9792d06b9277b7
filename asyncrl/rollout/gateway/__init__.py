"""An HTTP server in front of a run's engine, for agents that know nothing of the run."""
