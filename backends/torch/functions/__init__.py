"""What the built modules call where torch has no function of its own: plain torch, differentiable."""
