"""Training: documents, token shards, the loop and its Ray shell."""
