"""Training: the loop, its schedules, checkpoints and run folders."""
