"""Pictures of scans and label maps, each kind run as a module."""
