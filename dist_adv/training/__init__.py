"""Training: the loop, what it keeps, and how a run begins and ends."""
