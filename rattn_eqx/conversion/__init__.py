"""A pretrained full-attention model becomes a RATTENTION model: `student` begins it, transfer and training teach it."""
