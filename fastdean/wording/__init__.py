"""Text for people: the log, text that is safe to print, and the verdict on a figure."""
