"""Placements: one file each."""
