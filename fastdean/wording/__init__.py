"""What people are told: the log, text that steers nothing, and what may be said of a figure."""
