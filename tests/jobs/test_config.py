"""Configuration: files, overrides, and all mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.config import Config, ConfigError
from jobs.read_config import load_config, parse_date


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[fit]\ncomponents = 64\nlevels = 3\n")
    (tmp_path / "b.toml").write_text("[fit]\ncomponents = 32\n")
    config = load_config(
        [tmp_path / "a.toml", tmp_path / "b.toml"], ["fit.seed=7", "load.modalities={text = 2.0}"], warehouse="w"
    )
    assert (config.fit.components, config.fit.levels, config.fit.seed, config.warehouse) == (32, 3, 7, "w")
    assert config.load.modalities == {"text": 2.0}


def test_all_mistakes_are_told_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["fit.component=256", "fit.levels=many", "gate.min_distinct=3", "nonsense"])
    message = str(caught.value)
    assert "fit.component is not a setting; did you mean fit.components?" in message
    assert "fit.levels = 'many'" in message
    assert "gate.min_distinct = 3" in message
    assert "--set nonsense has no '='" in message


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[fit\n")
    with pytest.raises(ConfigError, match=r"(?s)absent\.toml does not exist.*broken\.toml is not TOML"):
        load_config([tmp_path / "absent.toml", tmp_path / "broken.toml"])


def test_a_weight_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"weight of text is 0\.0; expected a number above 0"):
        load_config(overrides=["load.modalities={text = 0.0}"])


def test_the_digest_names_the_settings() -> None:
    assert Config().digest("fit") == load_config(overrides=["gate.max_churn=0.5"]).digest("fit")
    assert Config().digest("fit") != load_config(overrides=["fit.seed=1"]).digest("fit")


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAREHOUSE", "elsewhere")
    assert load_config().warehouse == "warehouse"


def test_a_date_is_a_day() -> None:
    with pytest.raises(ConfigError, match="'2026-02-30' is not a day"):
        parse_date("2026-02-30")


def test_settings_of_how_to_fit_are_no_part_of_what_is_fitted() -> None:
    digest = load_config().digest("fit")
    assert load_config(overrides=["fit.workers=3", "fit.memory_mib=0", "fit.device=cpu"]).digest("fit") == digest
    assert load_config(overrides=["fit.method=em"]).digest("fit") != digest


def test_errors_do_not_repeat_credentials() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            overrides=[
                "spark.conf.spark.hadoop.fs.s3a.secret.key=4711471147",  # a number, where text is expected
                'mlflow = "http://ann:correct-horse@mlflow:5000"',  # a section expected
                "mlflow.experiment=[1, 'postgresql://ann:correct-horse@db/mlflow']",
                "spark.cnf.password=correct-horse",  # misspelt
                "spark.conf.password correct-horse",  # no '='
                "mlflow.tracking_url=http://ann:correct-horse@mlflow:5000",
            ]
        )
    message = str(caught.value)
    assert "correct-horse" not in message
    assert "4711471147" not in message
    assert "spark.cnf" in message
    assert "mlflow.tracking_url is not a setting; did you mean mlflow.tracking_uri?" in message


@pytest.mark.parametrize("dim", [0, -3, 65537, 2_000_000_000])
def test_dimensions_that_no_vector_has_are_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match=rf"load\.dims.*dimension of v is {dim}; expected 1 to 65536"):
        load_config(overrides=[f"load.dims={{v = {dim}}}"])


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[fit]\r\ncomponents = 64\r\n")
    assert load_config([tmp_path / "bom.toml"]).fit.components == 64


@pytest.mark.parametrize("content", ["[load]\nsource = 'caf\xe9'\n".encode("latin-1"), bytes(range(256))])
def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wrong.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"wrong\.toml is not UTF-8"):
        load_config([tmp_path / "wrong.toml"])


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        load_config([tmp_path])


@pytest.mark.parametrize("typed", ["20260101", "1e5", "true", "2026-01-31", "007", "-"])
def test_text_settings_take_what_was_typed(typed: str) -> None:
    assert load_config(overrides=[f"load.source={typed}"]).load.source == typed


def test_a_key_of_spark_may_have_dots() -> None:
    config = load_config(overrides=["spark.conf.spark.sql.shuffle.partitions=8"])
    assert config.spark.conf == {"spark.sql.shuffle.partitions": "8"}


@pytest.mark.parametrize(
    "setting",
    [
        "spark.master=lokal",
        "spark.driver_memory=banana",
        "spark.driver_memory=4",
        "nightly.refit_every_days=99999999999",
        "nightly.refit_every_days=0",
        "fit.levels=true",
        "fit.seed=1e20",
        "fit.seed=-1",
        "load.source=[1]",
    ],
)
def test_what_cannot_be_meant_is_refused(setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{name} = .*expected"):
        load_config(overrides=[setting])


@pytest.mark.parametrize("text", ["20260131", "2026-W05-6", "2026-1-31", "31.01.2026", "9999999-01-01", ""])
def test_a_day_has_one_form(text: str) -> None:
    with pytest.raises(ConfigError, match="expected YYYY-MM-DD"):
        parse_date(text)
