"""All workloads, in the order in which they run and are shown. To add one: a class or an instance here."""

from .determinism import Determinism
from .generation import Generation
from .linearity import Linearity
from .quantized import QUANTIZED
from .startup import Startup
from .training import TRAINING

WORKLOADS = [*TRAINING, QUANTIZED, Generation(), Startup(), Linearity(), Determinism()]
