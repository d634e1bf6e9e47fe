"""Every shipped configuration loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.read_config import load_config

CONF = Path(__file__).parent.parent.parent / "infra" / "conf"


@pytest.mark.parametrize("file", sorted(CONF.glob("*.toml")), ids=lambda file: file.name)
def test_configuration_loads(file: Path) -> None:
    assert load_config([file]).warehouse


def test_the_local_profile_is_the_default() -> None:
    assert load_config([CONF / "local.toml"]) == load_config()
