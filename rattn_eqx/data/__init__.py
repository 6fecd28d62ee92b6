"""From files to batches: a corpus, its tokens, batches of them; and models of bytes that a language model must beat."""
