"""Item embeddings: the source, its validation, what changed, packed bytes."""
