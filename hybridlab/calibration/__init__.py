"""What `hybridlab calibrate` measures on this machine: crossovers of paths, and a profile for the simulator."""
