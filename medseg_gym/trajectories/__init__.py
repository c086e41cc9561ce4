"""Trajectories: demonstrations for supervised training, sampled by strategies that see the target."""
