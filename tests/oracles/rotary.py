"""Rotary positions (Su et al. 2021, section 3.2.2) as complex numbers: pair i at position n is multiplied by
exp(i n base^(-2i/d))."""

import torch


def moved(x, distance, base, d, neighbours):
    """x (.., size), whose first d numbers are pairs, `distance` positions further on."""
    x = x.double()
    theta = torch.tensor([float(base) ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    first, second = (
        (list(range(0, d, 2)), list(range(1, d, 2)))
        if neighbours
        else (list(range(d // 2)), list(range(d // 2, d)))
    )
    z = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * distance * theta)
    y = x.clone()
    y[..., first], y[..., second] = z.real, z.imag
    return y
