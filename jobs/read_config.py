"""Reading the configuration: TOML files and `--set section.key=value` over the defaults. All mistakes are reported.

Mistakes come in the order of `jobs/config.py`, each with the value, what was expected and the nearest known name.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jobs.config import Config, ConfigError
from jobs.redaction import redact, redact_config, redact_setting

T = TypeVar("T")
FIRST_DAY, LAST_DAY = date(1970, 1, 1), date(2999, 12, 31)
SHOWN_CHARACTERS = 80  # of a wrong value in a message


def load_config(files: Iterable[Path] = (), overrides: Iterable[str] = (), **top: str) -> Config:
    """Defaults, then each TOML file, then `section.key=value` overrides, then keyword values; all mistakes at once.

    Raises:
        ConfigError: every wrong key and value, each with what was expected.
    """
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    for file in files:
        try:
            _merge(values, _read_toml(Path(file)))
        except ConfigError as error:
            mistakes += error.mistakes
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            missing = "no name before its '='" if equals else "no '='"
            shown = (override.split() or [override])[0].partition("=")[0]  # without the value: it may be a credential
            mistakes.append(f"--set {shown} has {missing}; expected section.key=value, such as fit.components=256")
            continue
        _merge(values, _set(name.strip(), text))
    _merge(values, {name: value for name, value in top.items() if value})
    redact_config(os.environ)  # `redact` then masks the credentials of the environment and the settings
    redact_config(values)
    try:
        config = Config(**values)
    except ValidationError as error:
        known = all_settings()
        order = {name: position for position, name in enumerate(known)}
        wrong = sorted(error.errors(), key=lambda item: order.get(_name(item, known), len(order)))
        mistakes += [_sentence(item, known) for item in wrong]
    if mistakes:
        raise ConfigError(*map(redact, mistakes))
    return config


def all_mistakes(*checks: Callable[[], T]) -> list[T]:
    """Run all checks and return their results.

    Raises:
        ConfigError: the mistakes of all checks together.
    """
    results: list[T] = []
    mistakes: list[str] = []
    for check in checks:
        try:
            results.append(check())
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(*mistakes)
    return results


def parse_date(text: str) -> date:
    """A run date as YYYY-MM-DD."""
    try:
        day = date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII) else None
    except ValueError:
        day = None
    if day is None:
        raise ConfigError(f"date {text!r} is not a day of the calendar; expected YYYY-MM-DD, such as 2026-01-31")
    if not FIRST_DAY <= day <= LAST_DAY:
        raise ConfigError(f"date {text} is not a day of a run; expected one from {FIRST_DAY} to {LAST_DAY}")
    return day


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(
            file.read_bytes().decode("utf-8-sig")
        )  # editors on Windows begin a file with a byte order mark
    except FileNotFoundError:
        wrong = "does not exist; give the path of a TOML file such as infra/conf/local.toml"
    except IsADirectoryError:
        wrong = "is a folder; expected a TOML file such as infra/conf/local.toml"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror}); expected a TOML file that this user may read"
    except UnicodeDecodeError as error:
        wrong = (
            f"is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}); expected TOML. "
            "Save it as UTF-8 if an editor wrote it in another encoding"
        )
    except (ValueError, RecursionError) as error:
        wrong = f"is not TOML: {error}"
    raise ConfigError(f"configuration file {file} {wrong}")


def _set(name: str, text: str) -> dict[str, Any]:
    """`section.key=value` as nested tables. After a setting that is a table the rest of the name is one key in it."""
    parts = name.split(".")
    setting = all_settings().get(".".join(parts[:2]))
    kind: Any = setting.annotation if setting else None
    if get_origin(kind) is dict and len(parts) > 2:
        parts, kind = (
            [*parts[:2], ".".join(parts[2:]).strip("\"'")],
            get_args(get_args(kind)[1])[:1] or get_args(kind)[1],
        )
    nested: Any = _toml_value(text)
    if kind in (str, (str,)) and not isinstance(nested, str | dict | list):
        nested = text.strip()  # as typed: 1e5 may be the name of a folder
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _toml_value(text: str) -> object:
    """`256` is a number, `true` a truth value, `{a = 1}` a table; anything else is the text as typed."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _sentence(error: Any, known: Mapping[str, FieldInfo]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4) or difflib.get_close_matches(
            path[-1], known, n=1, cutoff=0.4
        )
        hint = f"did you mean {near[0]}?" if near else f"known sections: {', '.join(Config.model_fields)}"
        return f"{name} is not a setting; {hint}"
    shown = repr(redact_setting(name, error["input"]))
    if len(shown) > SHOWN_CHARACTERS:
        shown = f"{shown[:SHOWN_CHARACTERS]}..."
    if error["type"] == "value_error":
        return f"{name} = {shown}: {error['ctx']['error']}"
    setting = known[_name(error, known)]
    expected = _expected(setting, inside=len(path) > 2)
    return f"{name} = {shown}; expected {expected}"


def _name(error: Any, known: Mapping[str, FieldInfo]) -> str:
    """The name of the setting that a mistake is in, or of its section."""
    path = [str(part) for part in error["loc"]]
    return next((name for name in (".".join(path[:2]), path[0]) if name in known), "")


def _expected(setting: FieldInfo, *, inside: bool) -> str:
    """The values that a setting takes, in words; with `inside` those of a key of a setting that is a table."""
    kind = setting.annotation
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is dict:
        return (
            {float: "a number", int: "a whole number"}.get(get_args(kind)[1], "text")
            if inside
            else "a table, such as {name = 1}"
        )
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section with settings such as {next(iter(kind.model_fields))}"
    if kind in (bool, str):
        return "true or false" if kind is bool else "text"
    bounds = {
        name: value
        for bound in setting.metadata
        for name in ("ge", "gt", "le")
        if (value := getattr(bound, name, None)) is not None
    }
    least = f"from {bounds['ge']} to" if "ge" in bounds else f"above {bounds['gt']} and at most"
    return f"{'a whole number' if kind is int else 'a number'} {least} {bounds['le']}"


def all_settings() -> dict[str, FieldInfo]:
    """Every section and setting by its dotted name, in the order of jobs/config.py."""
    settings: dict[str, FieldInfo] = {}
    for section, field in Config.model_fields.items():
        settings[section] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            settings |= {f"{section}.{key}": setting for key, setting in field.annotation.model_fields.items()}
    return settings
