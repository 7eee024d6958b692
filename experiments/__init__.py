"""Studies: what comes of a method, with controls and intervals over seeds."""
