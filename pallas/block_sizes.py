"""How a sequence is cut into blocks; a frozen value, so that it may be a static argument."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes, in tokens. None of them changes what is computed, beyond rounding.

    chunk, of `chunked`: queries handled together. The residual branch passes its state from chunk to chunk.
    key_block, of `chunked`: most keys that one step of the online softmax reads.
    group, of `chunked`: most chunks computed at the same time; memory grows with it, sequential steps shrink.
    kernel_chunk, of "gpu": keys that one step of the forward kernel reads, 64 or 128 (with heads above 64 always 128);
      None: as measured (`gpu_blocks`).
    chunks_per_state, of "gpu": the residual branch saves its state every `chunks_per_state` chunks (the paper's m) and
      recomputes those between; None: as measured.
    tpu_chunk, of "tpu": tokens of one head that a product of the residual kernels takes, a multiple of 128; None: as
      many as the matrix unit is wide.
    tpu_window_chunk, of "tpu": likewise, of the window's kernels; as tpu_chunk where windows or sequences are shorter.
    tpu_block, of "tpu": tokens that one step of the grid takes, or fewer where they do not fit. Between two steps the
      residual branch saves its state, and inside a step it recomputes the states.
    """

    chunk: int = 64
    key_block: int = 1024
    group: int = 4
    kernel_chunk: int | None = None
    chunks_per_state: int | None = None
    tpu_chunk: int | None = None
    tpu_window_chunk: int = 256
    tpu_block: int = 512

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"BlockSizes: {name} must be at least 1; got {value}")
        if self.kernel_chunk not in (None, 64, 128):
            raise ValueError(
                f"BlockSizes: kernel_chunk must be 64 or 128, or None for the measured one; got {self.kernel_chunk}"
            )
        for name in ("tpu_chunk", "tpu_window_chunk", "tpu_block"):
            if (getattr(self, name) or 128) % 128:
                raise ValueError(f"BlockSizes: {name} must be a multiple of 128; got {getattr(self, name)}")


CARD = "NVIDIA H100 80GB HBM3"  # the one that was measured, and that interpreted runs stand for

# (device, head size, dtype): {window: (kernel_chunk, chunks_per_state)}, the fastest forward + backward of those that
# `python -m pallas bench --sweep` timed at 8 x 4096 tokens, 16 query and 4 key/value heads, on 2026-11-25
# (data/runs/h100_sweep.jsonl). With heads of 64 and a window of 512, a chunk of 128 is 10% faster forward alone.
MEASURED = {
    (CARD, 128, "bfloat16"): {128: (128, 1), 512: (128, 1), 1024: (128, 1)},
    (CARD, 64, "bfloat16"): {128: (64, 1), 512: (64, 1), 1024: (128, 1)},
}
ALIKE = {"NVIDIA H200": CARD}  # the same chip with other memory
UNMEASURED = (128, 1)


def gpu_blocks(device: str, head_size: int, dtype: str, window: int) -> tuple[int, int]:
    """(kernel_chunk, chunks_per_state) of the "gpu" implementation: those of the next larger window that was measured.

    Of the largest, if the window is larger still; (128, 1) in other dtypes, for other head sizes and on devices that
    are neither measured nor `ALIKE`.
    """
    found = MEASURED.get((ALIKE.get(device, device), head_size, dtype))
    if found is None:
        return UNMEASURED
    return found[min((measured for measured in found if measured >= window), default=max(found))]


def gpu_candidates(head_size: int, window: int) -> list[BlockSizes]:
    """What `python -m pallas bench --sweep` times for the "gpu" implementation."""
    default = default_block_sizes(window, 4096)
    chunks = [chunk for chunk in (64, 128) if chunk >= min(head_size, 128)]
    return [dataclasses.replace(default, kernel_chunk=chunk, chunks_per_state=m) for chunk in chunks for m in (1, 2, 4)]


def default_block_sizes(window: int, t: int) -> BlockSizes:
    """A chunk of about the window, so that little is computed only to be masked: 32 to 64, or to 128 in long sequences.

    Short chunks are the fastest on CPU; longer ones mean fewer states to keep. Measured: LOG.md, 2026-11-24.
    """
    longest = 64 if t <= 4096 else 128
    return BlockSizes(chunk=min(max(32, 2 ** (max(window, 1) - 1).bit_length()), longest))


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
