"""The order of the stages in a night, and the promotion of codebooks."""
