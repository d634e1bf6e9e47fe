"""Parquet files and Delta tables, those of our tables and those that others wrote, on any file system."""
