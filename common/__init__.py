"""Shared by all versions: the network, the backend interface, the float64 reference, the data, the training loop."""
