"""Which entries of the weights are trained."""
