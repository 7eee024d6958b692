"""`python -m fastdean`."""

from fastdean.cli import main

main()
