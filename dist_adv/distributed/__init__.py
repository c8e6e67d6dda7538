"""Processes of one run: how they start, what they agree on, how they end."""
