"""The engine: runs programs on real devices."""
