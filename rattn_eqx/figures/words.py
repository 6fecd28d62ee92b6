"""A picture of a head in numbers, and what is to be said of it."""

import numpy as np

from rattn_eqx.figures.pair_map import PairMap


def numbers(found: PairMap) -> dict[str, float | int]:
    """What `PairMap` says in numbers; medians of collisions and recall over stored keys, NaN without any."""
    median = lambda x: float(np.median(x)) if len(x) else float("nan")
    return {
        "tokens": len(found.in_window), "window": found.window, "window_pairs": int(found.in_window.sum()),
        "residual_pairs": int(found.in_state.sum()), "stored": len(found.collisions), "distance": found.distance,
        "uniform_distance": found.uniform_distance, "effective_rank": found.effective_rank,
        "value_effective_rank": found.value_effective_rank, "collisions": median(found.collisions),
        "softmax_collisions": median(found.softmax_collisions), "recall": median(found.recall),
    }  # fmt: skip


def in_words(found: PairMap) -> str:
    """`numbers` in a line."""
    n = numbers(found)
    if not n["stored"]:
        return f"{n['window_pairs']:,} pairs of the window, none of the residual branch"
    return (
        f"distance from softmax {n['distance']:.2f} (equal weights {n['uniform_distance']:.2f}); rank "
        f"{n['effective_rank']:.1f} of {n['stored']} (values {n['value_effective_rank']:.1f}); collisions "
        f"{n['collisions']:.2f} (softmax {n['softmax_collisions']:.2f}); recall {n['recall']:.2f}"
    )


def remarks(found: PairMap, name: str) -> list[str]:
    """What a reader of the picture is told: of a window that sees all, a map that gives nothing, negative weights."""
    length, said = len(found.in_window), []
    if found.window >= length:
        beyond = "is beyond" if found.window > length else "covers"
        said.append(f"The window, {found.window}, {beyond} the {length} tokens: the residual branch has no pair.")
    weights = found.feature_weights[found.in_state]
    empty = found.in_state.any(axis=1) & ~found.feature_weights.any(axis=1)
    if len(weights) and not weights.any():
        said.append(f"{name} gives 0 for every residual pair: the branch adds nothing.")
    elif empty.any():
        said.append(f"{name} gives 0 for every residual pair of {empty.sum()} queries: there the branch adds nothing.")
    if (weights < 0).any():
        share = (weights < 0).mean()
        said.append(f"{share:.0%} of the weights of {name} are negative: those values are subtracted (black).")
    return said
