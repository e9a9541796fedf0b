"""``python -m keeplora``."""

from keeplora.cli import main

main()
