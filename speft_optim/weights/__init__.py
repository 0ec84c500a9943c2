"""The weights of a model: how they are found, stored and overlaid, and how their gradients are observed."""
