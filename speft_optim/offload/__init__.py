"""Computing on a device with weights that stay in host memory: for estimation, and for training."""
