"""The exceptions that callers of the library may catch."""


class TokenizerError(ValueError):
    """A mistake that the caller can correct; the message says how."""


class DataError(TokenizerError):
    """The embeddings cannot be fitted or encoded."""


class CodebookError(TokenizerError):
    """A codebook on disk is not what its manifest, or the caller, says."""


class LostWorker(TokenizerError):
    """A worker of a distributed fit is gone; the fit can be resumed from its last level."""
