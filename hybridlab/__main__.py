"""`python -m hybridlab` is the same as `hybridlab`."""

from hybridlab.cli.app import main

main()
