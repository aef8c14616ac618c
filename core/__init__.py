"""Share code between the scripts."""
