"""Measurements against peers: memory and speed."""
