"""Training: of drafters, and of small targets (the embedded digits DiT, the benchmarks' testbed)."""

from free.training.config import DrafterTrainingConfig
from free.training.loop import train_drafter
from free.training.target import TargetTrainingConfig, train_target

__all__ = ["DrafterTrainingConfig", "TargetTrainingConfig", "train_drafter", "train_target"]
