"""Folders of runs: what is in them, written whole, and read by one rule."""
