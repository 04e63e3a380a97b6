"""`python -m interceptors`: the command line."""

from interceptors.cli import main

main(prog_name="interceptors")
