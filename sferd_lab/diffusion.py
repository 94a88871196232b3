"""The angle process: diffusion as a rotation. Pure functions, no networks.

One angle ``phi`` in [0, pi/2] replaces every noise schedule: 0 is data, pi/2 is pure noise, and

    x_phi = cos(phi) x0 + sin(phi) eps            (forward process)
    v     = d x_phi / d phi = cos(phi) eps - sin(phi) x0        (velocity)

so alpha = cos(phi), sigma = sin(phi) and SNR = cot(phi)^2. This is the v-parameterisation of Salimans & Ho
(2022, appendix D) and TrigFlow of Lu & Song (2024) for data of unit scale. The pair (x, v) is the pair (x0, eps)
turned by phi, hence every conversion below is a rotation, and so is a deterministic DDIM step.

Throughout the library ``phi`` and ``psi`` are angles in radians, given as a float, a 0-d tensor or a tensor (B,); ``x`` has
shape (B, ...). A sampler walks from ``phi`` to a smaller ``psi``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sferd_lab.errors import SferdError

HALF_PI = math.pi / 2

Angle = float | Tensor


def as_angle(phi: Angle, x: Tensor) -> Tensor:
    """``phi`` as a tensor that broadcasts against ``x`` (B, ...): shape (B, 1, ...) or (1, 1, ...).

    Raises SferdError when ``phi`` lies outside [0, pi/2] or has neither one element nor one for each row of ``x``.
    """
    # A Python number would become float32, whose 7 digits are too few for x in float64.
    phi = phi if isinstance(phi, Tensor) else torch.tensor(phi, dtype=torch.float64)
    # Already in broadcast form: what this function returned.
    if phi.ndim == x.ndim > 1 and phi.numel() == phi.shape[0]:
        phi = phi.flatten()
    if phi.ndim > 1 or (phi.ndim == 1 and phi.shape[0] not in (1, x.shape[0])):
        raise SferdError(f"phi has shape {tuple(phi.shape)}; allowed: a number, or one angle for each of the {x.shape[0]} rows of x")
    # Looking at values on a GPU would make it wait. float32 rounds pi/2 up by 4e-8, hence the tolerance.
    if phi.is_cpu and not bool(((phi >= 0) & (phi <= HALF_PI + 1e-6)).all()):
        raise SferdError(
            f"phi runs from {phi.min().item():.6g} to {phi.max().item():.6g}; allowed: 0 (data) to pi/2 = {HALF_PI:.6g} (noise)"
        )
    return phi.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def check_descending(phi: Tensor, psi: Tensor) -> None:
    """Raise SferdError unless every step from ``phi`` to ``psi`` removes noise."""
    if phi.is_cpu and not bool((psi < phi).all()):
        raise SferdError(
            f"a step must go down in noise: psi = {psi.flatten().tolist()[:4]} is not below phi = {phi.flatten().tolist()[:4]}"
        )


def add_noise(x0: Tensor, eps: Tensor, phi: Angle) -> Tensor:
    """The forward process: x_phi = cos(phi) x0 + sin(phi) eps."""
    phi = as_angle(phi, x0)
    return phi.cos() * x0 + phi.sin() * eps


def velocity(x0: Tensor, eps: Tensor, phi: Angle) -> Tensor:
    """v = d x_phi / d phi = cos(phi) eps - sin(phi) x0 (Salimans & Ho 2022, appendix D)."""
    phi = as_angle(phi, x0)
    return phi.cos() * eps - phi.sin() * x0


def x0_from_v(x: Tensor, v: Tensor, phi: Angle) -> Tensor:
    """x0 = cos(phi) x - sin(phi) v. At phi = 0 this is x itself, whatever v."""
    phi = as_angle(phi, x)
    return phi.cos() * x - phi.sin() * v


def eps_from_v(x: Tensor, v: Tensor, phi: Angle) -> Tensor:
    """eps = sin(phi) x + cos(phi) v."""
    phi = as_angle(phi, x)
    return phi.sin() * x + phi.cos() * v


def v_from_x0(x: Tensor, x0: Tensor, phi: Angle) -> Tensor:
    """v = (cos(phi) x - x0) / sin(phi). Singular at phi = 0: not finite there."""
    phi = as_angle(phi, x)
    return (phi.cos() * x - x0) / phi.sin()


def v_from_eps(x: Tensor, eps: Tensor, phi: Angle) -> Tensor:
    """v = (eps - sin(phi) x) / cos(phi). Singular at phi = pi/2: not finite there."""
    phi = as_angle(phi, x)
    return (eps - phi.sin() * x) / phi.cos()


def ddim_step(x: Tensor, v: Tensor, phi: Angle, psi: Angle) -> Tensor:
    """One deterministic DDIM step: x_psi = cos(phi - psi) x_phi - sin(phi - psi) v.

    The rotation form of Song et al. (2021), equation 12 with eta = 0. It keeps the predicted (x0, eps) and changes only their mix.
    Raises SferdError unless psi < phi.
    """
    phi, psi = as_angle(phi, x), as_angle(psi, x)
    check_descending(phi, psi)
    return (phi - psi).cos() * x - (phi - psi).sin() * v


def implied_velocity(x: Tensor, x_next: Tensor, phi: Angle, psi: Angle) -> Tensor:
    """The velocity whose single DDIM step from (x, phi) lands on (x_next, psi): ``ddim_step`` solved for v.

    v = (cos(phi - psi) x - x_next) / sin(phi - psi). This is progressive distillation's target (Salimans & Ho 2022,
    appendix G), in a form without a special case at psi = 0. Raises SferdError unless psi < phi.
    """
    phi, psi = as_angle(phi, x), as_angle(psi, x)
    check_descending(phi, psi)
    return ((phi - psi).cos() * x - x_next) / (phi - psi).sin()


def heun_velocity(v1: Tensor, v2: Tensor, x_mid: Tensor, phi: Angle, psi: Angle) -> Tensor:
    """The averaged velocity of Heun's method on the circle, to be used in ``ddim_step`` from phi to psi.

    ``v1`` is the velocity at (x_phi, phi), ``x_mid`` the DDIM step with it, ``v2`` the velocity at (x_mid, psi):
    v = (v1 + cos(delta) v2 - sin(delta) x_mid) / 2 with delta = phi - psi; the last two terms turn v2 back to phi's frame,
    where both velocities mean the same thing. Second order in delta.
    """
    delta = as_angle(phi, x_mid) - as_angle(psi, x_mid)
    return (v1 + delta.cos() * v2 - delta.sin() * x_mid) / 2


def ddpm_step(x: Tensor, x0: Tensor, noise: Tensor, phi: Angle, psi: Angle) -> Tensor:
    """One ancestral step: a draw from q(x_psi | x_phi, x0) (Ho et al. 2020, equations 6 and 7).

    With a = cos(phi) / cos(psi) and b = 1 - a^2 (the noise that one forward step from psi to phi adds):
    mean = a sin(psi)^2 / sin(phi)^2 x + b cos(psi) / sin(phi)^2 x0, variance = b sin(psi)^2 / sin(phi)^2.
    ``noise`` is standard normal, of x's shape. Raises SferdError unless psi < phi.
    """
    phi, psi = as_angle(phi, x), as_angle(psi, x)
    check_descending(phi, psi)
    a = phi.cos() / psi.cos()
    b = 1 - a**2
    var_ratio = (psi.sin() / phi.sin()) ** 2
    mean = a * var_ratio * x + b * psi.cos() / phi.sin() ** 2 * x0
    return mean + (b * var_ratio).sqrt() * noise


def snr(phi: Tensor) -> Tensor:
    """Signal-to-noise ratio, cot(phi)^2: infinite at 0, zero at pi/2."""
    return phi.tan() ** -2


def log_snr(phi: Tensor) -> Tensor:
    """lambda = log SNR = -2 log tan(phi)."""
    return -2 * phi.tan().log()


def phi_from_log_snr(log_snr: Tensor) -> Tensor:
    """The inverse of ``log_snr``: atan(exp(-lambda / 2))."""
    return torch.atan(torch.exp(-log_snr / 2))


def phi_from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """DDPM's cumulative product to the angle: cos(phi) = sqrt(alpha_bar). ``alpha_bar`` in [0, 1]."""
    return torch.acos(alpha_bar.sqrt())


def phi_from_sigma(sigma: Tensor) -> Tensor:
    """EDM's variance-exploding noise level to the angle: phi = atan(sigma), and x_phi = cos(phi) x_VE."""
    return torch.atan(sigma)


def angle_grid(steps: int, phi_hi: float = HALF_PI, phi_lo: float = 0.0) -> Tensor:
    """``steps + 1`` equally spaced angles from ``phi_hi`` down to ``phi_lo``, float64.

    Equal angles are the cosine schedule alpha = cos(pi t / 2) with equal t, on which progressive distillation is defined.
    Raises SferdError when steps < 1 or not 0 <= phi_lo < phi_hi <= pi/2.
    """
    if steps < 1:
        raise SferdError(f"steps = {steps}; allowed: 1 or more")
    if not 0 <= phi_lo < phi_hi <= HALF_PI:
        raise SferdError(f"phi_lo = {phi_lo}, phi_hi = {phi_hi}; allowed: 0 <= phi_lo < phi_hi <= pi/2 = {HALF_PI:.6g}")
    return torch.linspace(phi_hi, phi_lo, steps + 1, dtype=torch.float64)
