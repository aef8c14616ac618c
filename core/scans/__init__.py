"""Read CT scans and label maps, resample them to the network's grid and back, and check them for anatomy."""
