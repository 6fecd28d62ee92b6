"""Makes tests/weights/fixtures: a tiny random model of each architecture by `transformers`, and its logits.

Run where torch and transformers are installed (on a CPU; made with torch 2.14.1 and transformers 5.24.0):
python tests/weights/make_fixtures.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parent / "fixtures"
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
THETA = {"rope_type": "default", "rope_theta": 50.0}
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
MODELS = {  # class, what differs from SIZES, dtype, largest file
    "llama": ("Llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 50.0, **LLAMA3}), "float32", "60kB"),
    "mistral": ("Mistral", dict(sliding_window=6, head_dim=12, rope_parameters=THETA), "bfloat16", "5GB"),
    "qwen2": (
        "Qwen2",
        dict(
            use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True, rms_norm_eps=1e-3
        ),
        "float32",
        "5GB",
    ),
    "qwen3": ("Qwen3", dict(head_dim=12, rope_parameters=THETA, rms_norm_eps=1e-2), "float32", "5GB"),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1], rope_parameters=THETA), "float32", "5GB"),
}
LENGTH = 48


def draw(model: torch.nn.Module, seed: int) -> None:
    """Parameters far from what they begin with: nothing hides behind a norm of 1 or a bias of 0."""
    generator = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        drawn = generator.standard_normal(tuple(parameter.shape))
        size = 1.0 if "embed" in name else 0.5 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
        shift = 1.0 if "norm" in name else 0.0
        parameter.data = torch.tensor(shift + size * drawn, dtype=torch.float32)


def older(path: Path) -> None:
    """config.json as version 4 wrote it."""
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], LENGTH)
    for seed, (name, (kind, changes, dtype, shard)) in enumerate(MODELS.items()):
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes}, attn_implementation="eager")
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        draw(model, seed)
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=shard)
        (folder / "generation_config.json").unlink(missing_ok=True)
        wide = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = wide(torch.tensor(tokens[None])).logits[0].numpy()
        np.savez(folder / "expected.npz", tokens=tokens.astype(np.int32), logits=logits)
        if name in ("llama", "qwen2"):
            older(folder / "config.json")
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(name, sorted(path.name for path in folder.iterdir()), size, float(logits.std()))


if __name__ == "__main__":
    main()
