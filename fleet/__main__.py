"""`python -m headrace.fleet`: the command line, where the script `headrace` is not installed."""

from headrace.fleet.cli import main

main()
