"""Robust accuracy: the only place where it is measured."""
