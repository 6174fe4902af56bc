"""Strategies: schedulers, placements and overlaps. They return frozen plans and read time only from their input."""
