"""Training: of small targets (the embedded digits DiT, the benchmarks' testbed)."""

from free.training.target import TargetTrainingConfig, train_target

__all__ = ["TargetTrainingConfig", "train_target"]
