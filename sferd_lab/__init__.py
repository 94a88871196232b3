"""sferd_lab: learn and test diffusion distillation."""
