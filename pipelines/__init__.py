"""The order of things: what a night is made of, and how a codebook is promoted."""
