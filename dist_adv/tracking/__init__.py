"""Where a run's figures go besides its folder: W&B, TensorBoard."""
