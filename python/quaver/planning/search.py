"""The largest batch that fits a card, by a few plans."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest"]

LIMIT = 2**31 - 1


def largest(peak: Callable[[int], int], size: int) -> int:
    """The largest batch from 1 on whose `peak` is at most `size`; 0 if none is.

    A peak is the largest of sums that grow linearly with the batch, so it is convex: a chord
    between a batch that fits and one that does not names a batch that fits.
    """
    low, least = 1, peak(1)
    if least > size:
        return 0
    high, most = 2, peak(2)
    while most <= size:
        if high == LIMIT:
            return LIMIT
        slope = max(1, (most - least) // (high - low))
        low, least = high, most
        # A line through two batches that fit is below the peak: it names one that may not fit.
        high = min(LIMIT, high + max(1, (size - most) // slope + 1))
        most = peak(high)
    while high - low > 1:
        middle = low + (high - low) * (size - least) // max(1, most - least)
        middle = min(max(middle, low + 1), high - 1)
        found = peak(middle)
        if found <= size:
            low, least = middle, found
        else:
            high, most = middle, found
    return low
