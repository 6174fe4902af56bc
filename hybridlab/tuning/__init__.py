"""`hl.tune`: searched on the simulator, verified on the engine."""
