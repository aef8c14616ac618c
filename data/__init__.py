"""Where data comes from: makers, checkers and readers of data sets, each run as a module."""
