"""What takes time: worker processes, runs, layers, cases to time, peers."""
