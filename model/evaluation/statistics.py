"""Owns uncertainty: Wilson bounds of shares, bootstrap intervals of all other figures."""

import math

import numpy as np

Z_95 = 1.6449  # one-sided 95%
NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50


def wilson_lower_bound(num_right: int, num_all: int) -> float:
    """Lower end of a one-sided 95% interval for a share.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    if num_all == 0:
        return 0.0
    share, z2 = num_right / num_all, Z_95**2
    centre = share + z2 / (2 * num_all)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_all + z2 / (4 * num_all**2))
    return (centre - spread) / (1 + z2 / num_all)


def resample(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Bootstrap: sums of the columns over units drawn with replacement.

    A draw of units serves all columns, so that differences between them are paired.

    Args:
        values: (units, columns).
    Returns:
        (resamples, columns).
    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979).
    """
    rng, sums = np.random.default_rng(seed), []
    num_units = len(values)
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = rng.integers(0, num_units, (RESAMPLES_AT_ONCE, num_units))
        times = np.stack([np.bincount(row, minlength=num_units) for row in drawn])
        sums.append(times @ values)
    return np.concatenate(sums)


def interval(value: float, resampled: np.ndarray) -> dict[str, float] | None:
    """A figure with the middle 95% of its resampled values; None where the figure is NaN."""
    if math.isnan(value):
        return None
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}
