"""The trained models of data/models: what they are, and that the one finds needles which the other cannot."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rattn_eqx
from rattn_eqx.ablation import grids
from rattn_eqx.ablation.rows import read_rows
from rattn_eqx.evaluation.recall import predict
from rattn_eqx.tasks.recall import score
from rattn_eqx.tasks.recall_text import needle

DATA = Path(__file__).parents[2] / "data"
TEXT = b"".join(path.read_bytes() for path in sorted((DATA / "sample").iterdir()))


@pytest.mark.parametrize(("name", "grid"), [("rattention_256", grids.maps), ("window_256", grids.pareto)])
def test_a_shipped_model_is_the_one_of_its_line(name, grid):
    model, tokenizer, config = rattn_eqx.load(DATA / "models" / name, "stored")
    origin = json.loads((DATA / "models" / name / "config.json").read_text("utf-8"))["origin"]
    [trial] = grids.named(grid(), origin["trial"])
    [row] = [x for x in read_rows(DATA / "runs" / "models.jsonl") if (x["name"], x["seed"]) == (trial.name, 1)]
    assert config == trial.model
    assert row["trial"] == trial.to_json()
    assert {key: row[key] for key in ("seed", "commit", "corpus")} == {
        key: origin[key] for key in ("seed", "commit", "corpus")
    }
    assert {x.dtype for x in jax.tree.leaves(model) if hasattr(x, "dtype")} == {jnp.dtype("bfloat16")}
    assert tokenizer is not None
    assert tokenizer.vocabulary_size == config.vocabulary_size
    for path in (DATA / "models" / name).iterdir():
        assert path.stat().st_size < 8e6


def test_only_the_residual_branch_finds_needles_behind_the_window():
    batch = needle(0, 3, 1024, haystack="corpus", text=TEXT, num_keys=8, num_queries=8, gap=256)
    found = {}
    for name in ("rattention_256", "window_256"):
        model, _, config = rattn_eqx.load(DATA / "models" / name)
        assert config.window * 2 < 1024
        found[name] = score(batch, predict(model, batch.tokens)).exact
    assert found["rattention_256"] > 0.7
    assert found["window_256"] < 0.2
