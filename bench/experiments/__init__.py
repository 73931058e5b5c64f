"""Programs run by hand: the GPU campaign, the A/A test, cost against work."""
