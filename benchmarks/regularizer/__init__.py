"""What the collapse regulariser adds to a training step, and measuring collapse to its passes."""
