"""What results of ablations say: means over seeds, and differences paired by seed."""

import dataclasses
from typing import Any

import numpy as np
from scipy.special import stdtrit  # quantiles of Student's t


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a trial from a baseline, over the seeds that both have: mean, half width of its 95% t interval, each seed's.

    The half width is NaN for fewer than two seeds.
    """

    mean: float
    half_width: float
    by_seed: dict[int, float]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half_width


def values(rows: list[dict[str, Any]], name: str, metric: str) -> dict[int, float]:
    """A trial's results by seed. Of several lines for a seed the last counts.

    Args:
      metric: as of `result`.
    """
    found = {}
    for row in rows:
        if row["name"] == name and (value := result(row, metric)) is not None:
            found[row["seed"]] = value
    return found


def result(row: dict[str, Any], metric: str) -> float | None:
    """One line's number, or None where it has none.

    Args:
      metric: "bits_per_byte"; or of the task's test at a length, such as "exact 2048", the share of answers that are
        right in every position, or "accuracy 2048", that of scored positions, some of which may be guessed from others.
    """
    kind, _, length = metric.partition(" ")
    if not length:
        return row[kind]
    return next((test[kind] for test in row["tests"] if test["length"] == int(length)), None)


def paired_difference(rows: list[dict[str, Any]], name: str, baseline: str, metric: str) -> Difference:
    """Trial minus baseline, paired by seed: a seed fixes the data and, in models of one shape, how they begin.

    Raises:
      ValueError: if the two have no seed in common.
    """
    ours, theirs = values(rows, name, metric), values(rows, baseline, metric)
    by_seed = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
    if not by_seed:
        raise ValueError(f"paired_difference: {name!r} and {baseline!r} share no seed with a result in {metric!r}")
    return Difference(*mean_and_half_width(list(by_seed.values())), by_seed)


def mean_and_half_width(numbers: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; NaN for one number."""
    n = len(numbers)
    spread = float(np.std(numbers, ddof=1)) / n**0.5 if n > 1 else float("nan")
    return float(np.mean(numbers)), float(stdtrit(n - 1, 0.975)) * spread if n > 1 else spread


def table(rows: list[dict[str, Any]], baseline: str | None = None) -> str:
    """A line for each trial: means over seeds, and where it differs from the baseline, by how much.

    Raises:
      ValueError: no rows, or a baseline that is not among them.
    """
    if not rows:
        raise ValueError("ablate: the results have no line; run a grid first, or give another --out")
    names = list(dict.fromkeys(row["name"] for row in rows))
    baseline = str(baseline or names[0])
    if baseline not in names:
        raise ValueError(f"ablate: no trial {baseline!r} in the results; they have {', '.join(names)}")
    lengths = sorted({test["length"] for row in rows for test in row["tests"]})
    metrics = ["bits_per_byte", *(f"exact {length}" for length in lengths)]
    metrics = [metric for metric in metrics if any(result(row, metric) is not None for row in rows)]
    width = max(map(len, names))
    lines = [f"{'':{width}}  seeds  " + "  ".join(f"{metric:>24}" for metric in metrics)]
    for name in names:
        cells = []
        for metric in metrics:
            found = values(rows, name, metric)
            cell = f"{np.mean(list(found.values())):.3f}" if found else ""
            if found and name != baseline and found.keys() & values(rows, baseline, metric).keys():
                difference = paired_difference(rows, name, baseline, metric)
                spread = f"± {difference.half_width:.3f}" if len(difference.by_seed) > 1 else "one seed"
                cell += f" {difference.mean:+.3f} {spread}"
            cells.append(f"{cell:>24}")
        seeds = len({row["seed"] for row in rows if row["name"] == name})
        lines.append(f"{name:{width}}  {seeds:>5}  " + "  ".join(cells))
    return "\n".join(lines) + f"\ndifferences from {baseline!r}, paired by seed, with 95% t intervals"
