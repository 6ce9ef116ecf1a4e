"""Analyse the errors of a model of any task: slices, calibration, drift, worst rows. Tasks add their own parts."""
