"""`python -m medseg_gym` is the medseg-gym command."""

from medseg_gym.cli import main

main()
