"""The MLflow registry, codebooks by content, the champion, and models as pyfuncs."""
