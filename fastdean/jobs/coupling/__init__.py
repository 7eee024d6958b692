"""The main job: score three data sets, couple, mask, measure before and after, report."""
