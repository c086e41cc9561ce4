"""Nano's training: the cases, the simulated interaction, the loop and the measurements."""
