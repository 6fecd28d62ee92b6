"""Train the models of data/models: RATTENTION-256 with the learned map, and its twin with the window alone.

    python data/make_models.py --out models

Both are trials of the grids `maps` and `pareto` (6,000 steps of text and needles, about two minutes on a large GPU),
each trained for some seeds at once. Every seed's model is written, in bfloat16 with the byte tokenizer, and a line of
its tests in RESULTS, as `rattn ablate` writes it, of the parameters as they are written.
"""

import argparse
from pathlib import Path
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp

from rattn_eqx.ablation import grids, rows, run
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.weights import own

RESULTS = "models.jsonl"
TRIALS = {"rattention_256": (grids.maps, "learned map 256"), "window_256": (grids.pareto, "window 256, no global")}


def rounded(model):
    """The model with every parameter rounded to bfloat16, in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if eqx.is_inexact_array(x) else x, model)


def make(name: str, seeds: list[int], data: run.Data, out: Path, commit: str | None) -> None:
    """Train, write and test one trial's seeds: out/NAME_seed, and lines of out/RESULTS."""
    grid, part = TRIALS[name]
    [trial] = grids.named(grid(), part)
    trained, train_trial = [], run.train_trial

    def train(*arguments, **options):
        models, losses, skipped = train_trial(*arguments, **options)
        trained.append(rounded(models))
        return trained[0], losses, skipped

    with mock.patch.object(run, "train_trial", train):
        found = run.run_trial(trial, seeds, data, attribution=True, commit=commit)
    for index, row in enumerate(found):
        model = jax.tree.map(lambda x, i=index: x[i].astype(jnp.bfloat16) if eqx.is_array(x) else x, trained[0])
        origin = {"made by": "data/make_models.py", "trial": trial.name, "seed": row["seed"], "commit": row["commit"],
            "corpus": row["corpus"], "date": row["date"], "device": row["device"]}  # fmt: skip
        own.save(model, out / f"{name}_{row['seed']}", tokenizer=ByteTokenizer(), origin=origin)
    rows.append_rows(out / RESULTS, found)
    print(f"{name}: {rows.summary(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=TRIALS, help="one of the two")
    parser.add_argument("--seeds", type=lambda x: [*map(int, x.split(","))], default=[1, 2])
    parser.add_argument("--corpus", default="python")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/rattn").expanduser())
    parser.add_argument("--commit", help="of this code, for the lines; by default git's")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = run.load_data(options.corpus, options.cache)
    for name in [options.only] if options.only else TRIALS:
        make(name, options.seeds, data, options.out, options.commit)


if __name__ == "__main__":
    main()
