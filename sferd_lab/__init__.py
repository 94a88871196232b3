"""sferd_lab: learn diffusion distillation, and test whether SFERD's claim about it holds.

The way through: ``config`` -> ``data`` -> ``denoiser`` (``unet``) -> ``train`` -> ``distill`` with a teacher guided by ``guidance``
-> ``semantic`` -> ``sample`` -> ``metrics`` -> ``experiment``, the run folder that all analysis reads.
"""

from sferd_lab.artifacts import Pretrained, load
from sferd_lab.config import Settings, make_settings, presets
from sferd_lab.errors import SferdError

__all__ = ["Pretrained", "Settings", "SferdError", "load", "make_settings", "presets"]
__version__ = "0.1.0"
