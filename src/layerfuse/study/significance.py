"""Student's t and Holm's correction, so that the statistics need numpy alone."""

import math

import numpy as np

LEVEL = 0.95
NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)


def t_two_sided(t: float, df: float) -> float:
    """P(|T| > |t|) of Student's t: with t = sqrt(df) tan(a) the density is cos(a)^(df - 1)."""
    if df > 1000:
        return math.erfc(abs(t) / math.sqrt(2))
    start = math.atan(abs(t) / math.sqrt(df))
    half = (math.pi / 2 - start) / 2
    area = half * np.sum(WEIGHTS * np.cos(start + half * (NODES + 1)) ** (df - 1))
    log_whole = 0.5 * math.log(math.pi) + math.lgamma(df / 2) - math.lgamma((df + 1) / 2)
    return float(min(1.0, 2 * area / math.exp(log_whole)))


def t_quantile(df: float) -> float:
    """The t that leaves 5 % outside ±t, by bisection."""
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 1 - LEVEL else (low, middle)
    return high


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    adjusted, running = [1.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable").tolist()):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted
