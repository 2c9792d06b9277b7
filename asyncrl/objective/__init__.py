"""Pure tensor functions: advantages, policy objectives, normalisation and diagnostics. Nothing but torch."""
