"""What cases of the Hopper kernels have in common."""

from pallas.block_sizes import BlockSizes

PAIR, ODD, WIDE = (2, 1, 64, 64), (3, 1, 64, 64), (2, 1, 128, 128)  # h, kv, d, dv


def blocks(kernel_chunk: int, chunks_per_state: int) -> tuple[str, BlockSizes]:
    return "block_sizes", BlockSizes(kernel_chunk=kernel_chunk, chunks_per_state=chunks_per_state)
