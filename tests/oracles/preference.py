"""Objectives on judged answers in float64, each with its derivative by every log-probability, by hand.

w, v: log-probabilities of the chosen and the rejected answer under the model; rw, rv: under the base; n, m:
their tokens. Each function returns the loss and its derivatives by w and v. Rafailov et al. 2023 (DPO), Azar
et al. 2023 (IPO), Hong et al. 2024 (ORPO), Meng et al. 2024 (SimPO), Ethayarajh et al. 2024 (KTO).
"""

import math


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def dpo(w, v, rw, rv, n, m, beta=0.1, smoothing=0.0):
    z = beta * ((w - rw) - (v - rv))
    loss = -(1 - smoothing) * math.log(sigmoid(z)) - smoothing * math.log(sigmoid(-z))
    slope = beta * (-(1 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z))
    return loss, slope, -slope


def robust(w, v, rw, rv, n, m, beta=0.1, smoothing=0.0):
    z = beta * ((w - rw) - (v - rv))
    loss = (-(1 - smoothing) * math.log(sigmoid(z)) + smoothing * math.log(sigmoid(-z))) / (1 - 2 * smoothing)
    slope = -beta * ((1 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z)) / (1 - 2 * smoothing)
    return loss, slope, -slope


def hinge(w, v, rw, rv, n, m, beta=0.1):
    z = beta * ((w - rw) - (v - rv))
    slope = -beta if z < 1 else 0.0
    return max(0.0, 1 - z), slope, -slope


def with_nats(w, v, rw, rv, n, m, beta=0.1, nll=1.0):
    loss, by_w, by_v = dpo(w, v, rw, rv, n, m, beta)
    return loss - nll * w / n, by_w - nll / n, by_v


def ipo(w, v, rw, rv, n, m, beta=0.1):
    apart = (w - rw) / n - (v - rv) / m - 1 / (2 * beta)
    return apart**2, 2 * apart / n, -2 * apart / m


def orpo(w, v, rw, rv, n, m, beta=0.1):
    p, q = w / n, v / m
    ratio = (p - q) - (math.log1p(-math.exp(p)) - math.log1p(-math.exp(q)))
    # d log odds / dp = 1 / (1 - e^p)
    outer = -beta * sigmoid(-ratio)
    return (
        -p - beta * math.log(sigmoid(ratio)),
        (-1 + outer / (1 - math.exp(p))) / n,
        -outer / (1 - math.exp(q)) / m,
    )


def simpo(w, v, rw, rv, n, m, beta=2.0, gamma=1.0):
    z = beta * (w / n - v / m) - gamma
    slope = -beta * sigmoid(-z)
    return -math.log(sigmoid(z)), slope / n, -slope / m


def kto(gain, good, z, beta=0.1, desirable=1.0, undesirable=1.0):
    """gain: log-probability above the base's. Returns the loss and its derivative by the gain."""
    value = sigmoid(beta * (gain - z) if good else beta * (z - gain))
    weight = desirable if good else undesirable
    return weight * (1 - value), weight * value * (1 - value) * beta * (-1 if good else 1)
