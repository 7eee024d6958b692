"""Does the first paper's table hold? With its settings, controls, the price and five seeds."""
