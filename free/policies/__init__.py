"""The sampler that a robot calls at every control step."""

from free.policies.sampler import Sampler

__all__ = ["Sampler"]
