"""Pictures of scans and label maps, each kind run as a module."""

import os

# All pictures are drawn into files. A notebook's shell names a backend of its own, which another environment may lack,
# and matplotlib refuses such a name while it is imported. This file runs before any import of matplotlib here.
os.environ["MPLBACKEND"] = "agg"
