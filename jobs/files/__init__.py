"""Files of others and of ours: Parquet folders and Delta tables as sources, row groups, small files on any file system."""
