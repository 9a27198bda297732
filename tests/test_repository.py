"""The repository's own promises: what is locked, and that nothing locks it to one registry."""

import json
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


def test_the_emulator_is_locked_by_hashes_and_to_no_registry():
    locked = json.loads((ROOT / "tests/e2e/emulator/package-lock.json").read_text())["packages"]
    asked = json.loads((ROOT / "tests/e2e/emulator/package.json").read_text())["dependencies"]
    packages = {path: package for path, package in locked.items() if path}
    assert all(packages[f"node_modules/{name}"]["version"] == version for name, version in asked.items())
    for path, package in packages.items():
        assert package["integrity"].startswith("sha512-"), path
        assert "resolved" not in package, path


def test_what_the_project_asks_for_is_locked():
    run_time = names(PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"])
    assert run_time <= locked("requirements.txt").keys()
    assert names(PROJECT["project"]["optional-dependencies"]["dev"]) <= locked("requirements-dev.txt").keys()


def test_development_runs_on_the_versions_of_production():
    assert locked("requirements.txt").items() <= locked("requirements-dev.txt").items()


def test_the_build_is_locked_to_one_version():
    assert PROJECT["build-system"]["requires"] == PROJECT["dependency-groups"]["build"]
