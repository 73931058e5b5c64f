"""A training run as people do it: its folder, checkpoints, data, features."""
