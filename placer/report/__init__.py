"""Results and inputs for a person to read."""
