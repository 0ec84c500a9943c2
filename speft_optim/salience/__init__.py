"""From calibration data to masks."""
