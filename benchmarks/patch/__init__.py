"""`fastdean.patch_checkpoint` against a plain copy of the same files."""
