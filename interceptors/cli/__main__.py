"""`python -m interceptors.cli`."""

from interceptors.cli import main

main()
