"""The second interpreter: the programs that the engine runs, on a clock. No torch; jax only where many are mapped."""
