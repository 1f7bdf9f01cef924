"""Passes that schedule what legalized operators become: nothing is left as naive loops."""
