"""The repository's own promises: what is locked, and that nothing locks it to one registry."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ["requirements.txt", "requirements-dev.txt", "tests/e2e/clients/openai2.txt"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", (ROOT / lock).read_text(), re.MULTILINE))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_registry_and_no_folder(lock: str):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not re.search(r"^-|file:|(^| )/", text, re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS)
def test_everything_locked_has_a_hash(lock: str):
    lines = (ROOT / lock).read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "==" in line:
            assert line.endswith("\\"), line
            assert following.strip().startswith("--hash=sha256:"), line


def test_what_the_project_asks_for_is_locked():
    run_time = names(PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"])
    assert run_time <= locked("requirements.txt").keys()
    assert names(PROJECT["project"]["optional-dependencies"]["dev"]) <= locked("requirements-dev.txt").keys()


def test_development_runs_on_the_versions_of_production():
    assert locked("requirements.txt").items() <= locked("requirements-dev.txt").items()


def test_the_build_is_locked_to_one_version():
    assert PROJECT["build-system"]["requires"] == PROJECT["dependency-groups"]["build"]
