"""Is the data of a suite all there and sound? One answer for each task, whatever is wrong with the others."""

from keeplora.data.doctor.check import Progress, TaskCheck
from keeplora.data.doctor.examine import examine, summary

__all__ = ["Progress", "TaskCheck", "examine", "summary"]
