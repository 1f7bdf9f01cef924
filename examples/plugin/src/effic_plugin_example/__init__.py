"""A pass and a target for effic."""
