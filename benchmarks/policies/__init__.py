"""Policies for robots on Meta-World: demonstrations, a DiT for action chunks, success and time by sampler."""
