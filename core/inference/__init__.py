"""Segment new scans: find the inputs, overlap the stages, write the output folder."""
