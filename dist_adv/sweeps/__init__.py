"""Many runs from one file: here, side by side, or as jobs of Slurm."""
