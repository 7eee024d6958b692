"""`make gpu-first`: what a GPU has to say in a few minutes, whatever cuts them."""
