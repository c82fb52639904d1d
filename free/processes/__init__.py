"""Every supported sampler as one table, and where such tables come from."""

from free.processes.ddpm import VARIANCES
from free.processes.table import ReverseProcess
from free.processes.variance import learned_log_variance

__all__ = ["VARIANCES", "ReverseProcess", "learned_log_variance"]
