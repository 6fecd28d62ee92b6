"""Named model sizes."""

from rattn_eqx.model.config import ModelConfig

# Trained on two laptop cores in minutes; how its numbers were chosen stands in LOG.md.
tiny = ModelConfig(
    vocabulary_size=258,
    model_width=96,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_size=48,
    feed_forward_width=256,
    window=64,
    rla_gain=0.3,
)

small = ModelConfig(
    vocabulary_size=258,
    model_width=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_size=64,
    feed_forward_width=1536,
    window=512,
)

# The paper's table 1; its vocabulary is not public, so ours is a common size.
paper_3b = ModelConfig(
    vocabulary_size=49152,
    model_width=2048,
    num_layers=56,
    num_heads=16,
    num_kv_heads=4,
    head_size=128,
    feed_forward_width=6656,
    window=512,
    gate="silu",
)

paper_12b = ModelConfig(
    vocabulary_size=49152,
    model_width=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=8,
    head_size=128,
    feed_forward_width=16384,
    window=512,
    gate="silu",
)

presets = {"tiny": tiny, "small": small, "paper_3b": paper_3b, "paper_12b": paper_12b}
