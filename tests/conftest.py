"""Fixtures that the tests of several packages share: small checkpoints, data and caches, really made and saved."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("teacher"), seed=1, hidden=32)


@pytest.fixture(scope="session")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another hidden size than the teacher's, the same tokenizer, another padding of the LM head."""
    return tiny.save_model(tmp_path_factory.mktemp("student"), seed=2, hidden=24, lm_head_rows=72)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "rows.parquet")


@pytest.fixture(scope="session")
def cache_path(teacher_path: Path, data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything stored, in float32: nothing is cut."""
    return tiny.make_cache(teacher_path, data_path, tmp_path_factory.mktemp("whole") / "cache")
