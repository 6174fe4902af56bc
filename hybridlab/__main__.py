"""`python -m hybridlab` is the same as `hybridlab`."""

from hybridlab.cli import main

main()
