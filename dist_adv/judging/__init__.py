"""Judge networks: the final weights of a run, or anybody's."""
