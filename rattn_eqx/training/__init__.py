"""From batches to a trained model: loss, step, loop, checkpoints, and the folder of a run."""
