"""Credentials are masked by name, by shape and by value; ordinary text stays as it is."""

from __future__ import annotations

import pytest

from jobs.redaction import redact, redact_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://ann:hunter22@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("mysql+pymysql://ann:p@ss/w:rd@db/mlflow is down", "mysql+pymysql://***@db/mlflow is down"),
        ("https://4f3c9a@mlflow.example:5000/api", "https://***@mlflow.example:5000/api"),
        ("s3a://ID:SECRET1@bucket/path", "s3a://***@bucket/path"),
        (
            "jdbc:mysql://db/x?user=ann&password=hunter22&useSSL=true",
            "jdbc:mysql://db/x?user=ann&password=***&useSSL=true",
        ),
        ("https://acct.blob.example/c?sv=2022&sig=a%2Fb%3D", "https://acct.blob.example/c?sv=2022&sig=***"),
        ("--conf spark.hadoop.fs.s3a.secret.key=wJalrXUtnFEMI", "--conf spark.hadoop.fs.s3a.secret.key=***"),
        ("-Djavax.net.ssl.trustStorePassword=changeit7 -Xmx4g", "-Djavax.net.ssl.trustStorePassword=*** -Xmx4g"),
        ('{"api_key": "abc def", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("{'token': 'abc', 'n': 1}", "{'token': '***', 'n': 1}"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("id AKIAIOSFODNN7EXAMPLE ends", "id *** ends"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSM", "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_a_credential_in_text_is_masked(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://mlflow:5000/api/2.0/mlflow/runs?x=a@b",
        "abfss://container@account.dfs.core.windows.net/semantic-ids",
        "sqlite:////data/w/mlflow.db",
        "models:/semantic-id-codebook@champion",
        "item_tokens: 300, tokenizer: ours, hash 4237974d87eef386",
        "KeyError: 'codebook'; primary key: item_id; token_embedding = 12",
        "/data/Team1/2026/vectors.parquet has no column item_id",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_settings_are_masked_by_name_and_then_everywhere_by_value() -> None:
    values = {
        "mlflow": {"tracking_uri": "http://ann:correct-horse@mlflow:5000", "experiment": "nights"},
        "spark": {"conf": {"spark.hadoop.fs.azure.account.key.acct": "0xBATTERY", "spark.sql.shuffle.partitions": "8"}},
        "load": {"dims": {"token_embedding": 12}},
    }
    assert redact_config(values) == {
        "mlflow": {"tracking_uri": "http://***@mlflow:5000", "experiment": "nights"},
        "spark": {"conf": {"spark.hadoop.fs.azure.account.key.acct": "***", "spark.sql.shuffle.partitions": "8"}},
        "load": {"dims": {"token_embedding": 12}},
    }
    assert values["mlflow"]["tracking_uri"] == "http://ann:correct-horse@mlflow:5000"  # a copy
    assert redact("login refused for correct-horse with 0xBATTERY") == "login refused for *** with ***"


def test_the_folder_of_the_shell_is_no_password() -> None:
    assert redact_config({"PWD": "/data/warehouse", "DB_PWD": "hunter2hunter2"}) == {
        "PWD": "/data/warehouse",
        "DB_PWD": "***",
    }
    assert redact("in /data/warehouse") == "in /data/warehouse"
