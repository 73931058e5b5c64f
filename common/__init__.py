"""What every backend shares: the network, the contract, the truth it is held to, the data and the training loop."""
