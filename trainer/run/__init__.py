"""What a run is given and says before and after training."""
