"""Keeps credentials out of what is printed and written: logs, error messages, JSON files and the config.json of runs.

A credential is recognised in three ways: by the name it is set under (`...password`, `...secret.key`), by its shape
(`user:password@` in a URI, a bearer token, an AWS key id), and by its value after `redact_config` has read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
SHORTEST = 6  # characters; shorter values are not masked by value, as they occur in ordinary text

_EVERYWHERE = r"password|passwd|passphrase|secret|credential"  # a name with one of these in it holds a credential
_AS_WORD = r"pass|pwd|token|sas|sig|signature|auth|authorization|apikey|accesskey|cookie"  # only as a word of the name
_KEY = (
    r"(?:access|account|api|auth|client|encryption|master|private|service|shared|signing|ssh|storage|subscription)"
    r"[._-]?key"
)
# In a configuration `...key` is enough; in text the word is too common ("key: value").
_SECRET_NAME = re.compile(rf"{_EVERYWHERE}|(?<![a-z])(?:{_AS_WORD}|key)(?![a-z])", re.IGNORECASE)
_PAIR = re.compile(
    rf"""(?P<name>[\w.\-]*(?:(?:{_EVERYWHERE})[\w.\-]*|(?<![a-z])(?:{_AS_WORD}|{_KEY})(?:\.[\w.\-]*)?))"""
    r"""(?P<between>\\?["']?\s*(?:[=:]|=>)\s*)(?P<value>\\?"[^"]*"|\\?'[^']*'|[^\s"'&]+(?<![,;)}\]]))""",
    re.IGNORECASE,
)
# A port ("http://host:5000/") is no password. The host follows the last @ of the word, since a password may contain
# one.
_PASSWORD_IN_URI = re.compile(
    r"""(?P<scheme>[a-z][\w+.\-]*://)[^\s:/?#@'"]*:(?!\d{1,5}(?:[/?#\s'"]|$))[^\s'"]*@""", re.IGNORECASE
)
_USER_IN_URI = re.compile(r"""(?P<scheme>https?://)[^\s/?#@'"]+@""", re.IGNORECASE)
_SHAPES = re.compile(
    r"""\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"""
    r"""|\beyJ[\w\-]{6,}\.[\w\-]{6,}(?:\.[\w\-]*)?"""
    r"""|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w\-]{16,}"""
    r"""|\bdapi[0-9a-f]{32}|\bhf_[A-Za-z0-9]{20,}"""
    r"""|\bxox[abprs]-[\w\-]{10,}|\bAIza[\w\-]{35}|\bsk-[\w\-]{20,}"""
    r"""|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)""",
    re.DOTALL,
)
_SCHEME_AND_TOKEN = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[\w.~+/\-]{8,}=*", re.IGNORECASE)

FOLDERS = ("PWD", "OLDPWD")  # variables of a shell: the folder it is in, no password
_credentials: set[str] = set()  # values that this process masks


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a credential."""
    return name not in FOLDERS and bool(_SECRET_NAME.search(_with_word_breaks(name)))


def redact(text: str) -> str:
    """`text` with every credential replaced by `***`."""
    for value in sorted(_credentials, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _PASSWORD_IN_URI.sub(rf"\g<scheme>{MASK}@", text)
    text = _USER_IN_URI.sub(rf"\g<scheme>{MASK}@", text)
    text = _SCHEME_AND_TOKEN.sub(rf"\g<kind> {MASK}", text)
    text = _PAIR.sub(_masked_pair, text)
    return _SHAPES.sub(MASK, text)


def redact_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of nested settings with credentials masked, which `redact` then masks everywhere.

    Numbers and truth values stay (`load.dims.token_embedding = 12`): no setting that holds a credential is one.
    """
    return {name: redact_setting(f"{prefix}{name}", value) for name, value in values.items()}


def redact_setting(name: str, value: Any) -> Any:
    """The value of the setting `name` (dotted), or `***` if it is a credential."""
    if isinstance(value, Mapping):
        return redact_config(value, f"{name}.")
    if isinstance(value, list | tuple):
        return [redact_setting(name, item) for item in value]
    # A Spark property is text, so there a number is a mistyped one and may be a password.
    if is_secret(name) and value and (isinstance(value, str) or name.startswith("spark.conf.")):
        remember(str(value))
        return MASK
    if not isinstance(value, str):
        return value
    for match in _PASSWORD_IN_URI.finditer(value):
        remember(match.group().removeprefix(match["scheme"]).partition(":")[2].removesuffix("@"))
    return redact(value)


def remember(value: str) -> None:
    """Let `redact` mask this value wherever it occurs."""
    if len(value) >= SHORTEST:
        _credentials.add(value)


def _masked_pair(match: re.Match[str]) -> str:
    value = match["value"]
    if value.startswith(MASK) or value.lower() in ("true", "false", "none", "null", "bearer", "basic"):
        return match.group()
    quote = re.match(r"""\\?["']""", value)
    edge = quote.group() if quote else ""
    return f"{match['name']}{match['between']}{edge}{MASK}{edge[-1:]}"


def _with_word_breaks(name: str) -> str:
    """`trustStoreKey` as `trust Store Key`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
