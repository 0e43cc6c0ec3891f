"""All workloads, in the order in which they run and are shown. To add one: a class or an instance here."""

from .determinism import Determinism
from .generation import Generation
from .linearity import Linearity
from .startup import Startup
from .training import TRAINING

WORKLOADS = [*TRAINING, Generation(), Startup(), Linearity(), Determinism()]
