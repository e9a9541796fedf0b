"""The method on `nn.Module` through stock PEFT."""

from keeplora.tuner.audit import Audit
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.learner import ContinualLearner
from keeplora.tuner.ledger import Ledger, TaskRecord

__all__ = ["Audit", "ContinualLearner", "KeepLoraConfig", "Ledger", "TaskRecord"]
