"""Say what lies behind the metrics of a model of any task: slices, calibration, drift, worst rows. Tasks add their own."""
