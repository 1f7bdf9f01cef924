"""Calibration: the samples a pass may look at, and what it may ask about the model's values on them."""
