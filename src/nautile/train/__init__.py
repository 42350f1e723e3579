"""Pre-training: the loop and what stands around it — recipe, schedules, optimiser, losses, checkpoints, report."""
