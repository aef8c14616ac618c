"""Train a network: set up, losses, the step, memory plans, augmentation, batches, the run and its folder."""
