"""Medians and spreads. Nothing is ever left out."""

import statistics


def median(values):
    return statistics.median(values)


def summary(values):
    """What the tables show of repeated measurements."""
    values = sorted(values)
    return {"median": median(values), "min": values[0], "max": values[-1], "count": len(values)}


def shown(values, digits=0):
    """`271 [263–275]`"""
    if not values:
        return "–"
    s = summary(values)
    return f"{s['median']:.{digits}f} [{s['min']:.{digits}f}–{s['max']:.{digits}f}]"


def ratio(ours, theirs):
    """Ratio of the medians, and the spread of the ratios of the rounds."""
    rounds = [a / b for a, b in zip(ours, theirs)]
    return {"of_medians": median(ours) / median(theirs), "min": min(rounds), "max": max(rounds)}
