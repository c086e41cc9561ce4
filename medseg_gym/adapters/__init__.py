"""Thin adapters to other trainers: none holds logic of its own, and the core imports none of them."""
