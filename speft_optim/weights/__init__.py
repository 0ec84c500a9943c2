"""The weights of a model: where they live, what holds them, and how their gradients are observed."""
