"""The pictures that `plot.py` draws, one file each; all of them need matplotlib."""
