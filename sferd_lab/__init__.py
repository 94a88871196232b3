"""sferd_lab: learn diffusion distillation, and test whether SFERD's claim about it holds.

The way through: ``config`` -> ``data`` -> ``denoiser`` (``unet``) -> ``train`` -> ``distill`` with a teacher guided by ``guidance``
-> ``semantic`` -> ``sample`` -> ``metrics`` -> ``experiment``, the run folder that all analysis reads.
"""

import warnings

from sferd_lab.artifacts import Pretrained, load
from sferd_lab.config import Settings, make_settings, presets
from sferd_lab.errors import SferdError

__all__ = ["Pretrained", "Settings", "SferdError", "load", "make_settings", "presets"]
__version__ = "0.1.0"

# Python warns of a command whose module its package has imported already; this one is meant.
warnings.filterwarnings("ignore", "'sferd_lab.config' found in sys.modules", RuntimeWarning)
