"""python -m recycle."""

from .cli import main

main()
