"""A CT scan or label map: read (NIfTI, DICOM), its geometry, onto the network's grid and back, anatomy."""
