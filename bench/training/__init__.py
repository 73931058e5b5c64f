"""A training run: its folder, checkpoints, pictures and features."""
