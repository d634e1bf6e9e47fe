"""Ranking with semantic IDs: sources of IDs and models of a click, compared on the same impressions."""
