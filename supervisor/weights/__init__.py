"""Where the weights are, and how they get there."""
