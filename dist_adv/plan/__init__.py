"""What a run would take on more GPUs."""
