"""How wide a window each round takes: given, planned, or chosen on the way."""

from free.windows.automatic import AutoWindow, ChosenWindow, Experience, expected_advance
from free.windows.exploring import ExploringWindow, TimedExperience
from free.windows.heard import HeardKeys, KeyLog, together
from free.windows.load import LoadWindow, check_load
from free.windows.schedule import WINDOWS, FixedWindow, Known, Schedule, WindowPlan, check_window, schedule_of
from free.windows.timing import Measurements, RoundSeconds, by_window, seconds_now

__all__ = [
    "WINDOWS",
    "AutoWindow",
    "ChosenWindow",
    "Experience",
    "ExploringWindow",
    "FixedWindow",
    "HeardKeys",
    "KeyLog",
    "Known",
    "LoadWindow",
    "Measurements",
    "RoundSeconds",
    "Schedule",
    "TimedExperience",
    "WindowPlan",
    "by_window",
    "check_load",
    "check_window",
    "expected_advance",
    "schedule_of",
    "seconds_now",
    "together",
]
