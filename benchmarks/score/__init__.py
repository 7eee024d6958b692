"""`fastdean.score` against other ways to the same sums: its time, its growth, its selections."""
