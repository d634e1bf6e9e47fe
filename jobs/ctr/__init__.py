"""The consumer of semantic IDs: DMQN, a CTR model over long behaviour sequences (arXiv 2508.20865)."""
