"""Overlaps: one file each."""
