"""The pages are true: what they show runs, what they name is there, and their tables are those of the code.

An example runs when its fence says so: `python runnable`, `sh runnable`. With `demo` behind it, it talks to a gateway,
of its page's own, and has the demo's address, key and user in its environment. With `refused`, it ends with a refusal.
A fence `text output` behind an example holds what it prints, a fence `json output` the answers, in which `…` stands for
whatever was there. A fence `ledger runnable` is a table of `tests/ledger/spec.py`. A fence `toml farebox.toml` is
written to that file, for the examples behind it.
"""

import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from gateway import settings
from gateway.cli import cli as command_line
from gateway.errors import KINDS
from gateway.proxy.settlement import TABLE
from ledger.errors import error_of
from ledger.outcomes import Reason, Rejected
from tests.gateway.office import open_office
from tests.ledger import spec

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE_ROOTS = ("", "gateway", "pricing", "ledger")
START_TIMEOUT_S = 60
PAGE_TIMEOUT_S = 180
ELLIPSIS = "…"
"""Stands for what differs from one time to the next, as ids and times do."""


class Block(NamedTuple):
    """One fenced block. *output* is what the page says that it prints, as text or as *answers* in JSON."""

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    text: str
    output: str | None
    answers: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found: list[Block] = []
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, marks, content = match[1], tuple(match[2].split()), match[3]
        if (language, marks) == ("text", ("output",)):
            found[-1] = found[-1]._replace(output=content)
        elif (language, marks) == ("json", ("output",)):
            found[-1] = found[-1]._replace(answers=content)
        else:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page.relative_to(ROOT).as_posix(), line, language, marks, content, None))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
EXAMPLES = [block for block in BLOCKS if block.language in ("python", "sh") and "runnable" in block.marks]
TABLES = [block for block in BLOCKS if block.language == "ledger"]
SETTINGS = [block for block in BLOCKS if block.language == "toml"]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading, without its head."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    body = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in line.strip("|").split("|")])
    return body


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# What is shown runs.


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands `farebox` and `python3`, and a curl that takes an error status for a failure."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "bin").mkdir()
    for name, does in (("farebox", "-m gateway.cli "), ("python3", "")):
        command = folder / "bin" / name
        command.write_text(f"#!/bin/sh\nexec '{sys.executable}' {does}\"$@\"\n")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    (folder / ".curlrc").write_text("fail-with-body\nshow-error\n")
    return folder


@pytest.fixture(scope="module")
def environment(workshop: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FAREBOX_", "OPENAI_"))}
    return {
        **inherited,
        "PATH": f"{workshop / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(workshop),
        "CURL_HOME": str(workshop),
        "NO_PROXY": "127.0.0.1",
        "OPENAI_API_KEY": "sk-none",
    }


@pytest.fixture
def demo(workshop: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A demo that runs; what its JSON line says."""
    running = subprocess.Popen(
        [workshop / "bin" / "farebox", "demo", "--json", "--port", "0"],
        cwd=workshop,
        env=environment,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert running.stdout is not None
    with running.stdout as stdout:
        try:
            ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_S)
            assert ready, "the demo did not start in time"
            yield json.loads(stdout.readline())
        finally:
            running.send_signal(signal.SIGTERM)
            assert running.wait(START_TIMEOUT_S) == 0


@pytest.mark.parametrize("page", sorted({block.page for block in EXAMPLES}))
def test_the_examples_of_a_page_run(
    page: str, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
):
    shown = [block for block in BLOCKS if block.page == page]
    examples = [block for block in shown if block in EXAMPLES or (block.language == "toml" and block.marks)]
    if any("curl" in block.text for block in examples) and shutil.which("curl") is None:
        pytest.skip("there is no curl")
    env = dict(environment)
    if any("demo" in block.marks for block in examples):
        started = request.getfixturevalue("demo")
        env |= {
            "FAREBOX_URL": started["base_url"],
            "FAREBOX_KEY": started["live_key"],
            "FAREBOX_USER": started["user"],
            "FAREBOX_ADMIN": started["admin_key"],
            "FAREBOX_BASE_URL": started["base_url"],
            "FAREBOX_API_KEY": started["live_key"],
        }
    wanted = [[block.language, block.marks[0], block.text] for block in examples]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "page_runner.py"],
        input=json.dumps(wanted),
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=PAGE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for block, result in zip(examples, json.loads(done.stdout), strict=True):
        refused = "refused" in block.marks
        assert (result["failure"] is not None) == refused, f"{block.place}\n{result['failure']}"
        if block.output is not None:
            assert result["output"] == block.output, block.place
        if block.answers is not None:
            shown, given = documents(block.answers), documents(result["output"])
            assert fits(shown, given), f"{block.place}\n{json.dumps(given, indent=2)}"


def documents(text: str) -> list[Any]:
    """The JSON documents that *text* holds, one after the other."""
    decoder, found, rest = json.JSONDecoder(parse_float=Decimal), [], text.strip()
    while rest:
        document, end = decoder.raw_decode(rest)
        found.append(document)
        rest = rest[end:].strip()
    return found


def fits(shown: Any, given: Any) -> bool:
    """Whether *given* is what is *shown*; a member or an item `…` stands for those that are left out."""
    if isinstance(shown, dict):
        whole = ELLIPSIS in shown or shown.keys() == given.keys()
        return whole and all(
            name in given and fits(value, given[name]) for name, value in shown.items() if name != ELLIPSIS
        )
    if isinstance(shown, list):
        return len(shown) == len(given) and all(map(fits, shown, given))
    if isinstance(shown, str) and ELLIPSIS in shown:
        return isinstance(given, str) and re.fullmatch(re.escape(shown).replace(ELLIPSIS, ".*"), given) is not None
    return bool(shown == given)


@pytest.mark.parametrize("table", TABLES, ids=lambda block: block.place)
def test_a_table_of_the_ledger_holds(table: Block):
    spec.check(table.text)


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: block.place)
def test_settings_that_are_shown_are_settings(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "farebox.toml"
    file.write_text(block.text)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    loaded = settings.load(file)
    assert set(tomllib.loads(block.text)) <= loaded.model_fields_set


# What is named is there.


def anchors(page: Path) -> set[str]:
    """The names that a heading can be linked by, as GitHub and others derive them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path):
    for name in quoted(page.read_text()):
        if re.fullmatch(r"[\w/.-]+/[\w.-]+\.(py|md|toml|yml)|[\w./-]+/", name):
            assert any((ROOT / root / name).exists() for root in CODE_ROOTS), name


def test_the_plan_of_the_house_is_the_house():
    plan = next(block for block in BLOCKS if block.page == "docs/architecture.md" and block.language == "text")
    shown: dict[Path, set[str]] = {}
    for line in plan.text.splitlines():
        indent, names = re.match(r"( *)([^\s,]+(?:, [^\s,]+)*)", line).groups()  # type: ignore[union-attr]
        if not indent:
            folder = ROOT / names
        shown.setdefault(folder, set()).update(name.rstrip("/") for name in names.split(", ") if indent)
    for folder, names in shown.items():
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        packages = {path.parent.name for path in folder.glob("*/__init__.py")}
        assert names >= modules | packages
        assert all((folder / name).exists() for name in names)


def test_make_has_the_targets_that_are_shown():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = set()
    for page in PAGES:
        shown |= {target for code in quoted(page.read_text()) for target in re.findall(r"^make ([a-z]+)$", code)}
    shown |= {
        target for block in BLOCKS if block.language == "sh" for target in re.findall(r"make ([a-z]+)", block.text)
    }
    assert "run" in shown
    assert shown <= targets


def test_the_table_of_commands_is_the_command_line():
    listed = {command.removeprefix("farebox ") for row in rows("README.md", "command") for command in quoted(row[0])}
    group = typer.main.get_command(command_line)
    assert listed == set(group.commands)  # type: ignore[attr-defined]


# Tables are those of the code.


async def test_the_table_of_endpoints_is_the_apis(tmp_path: Path):
    listed = [endpoint for row in rows("docs/api/README.md", "endpoint") for endpoint in quoted(row[0])]
    async with open_office(tmp_path) as office:
        paths = (await office.ask_plain("/openapi.json")).json()["paths"]
    served = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert sorted(listed) == sorted(served)


@pytest.mark.parametrize(
    ("shown", "given"),
    [
        ('{"a": 1}', '{"a": 2}'),
        ('{"a": 1}', '{"a": 1, "b": 2}'),
        ('{"a": 1, "…": ""}', '{"b": 1}'),
        ('{"a": "cus_…"}', '{"a": "req_1"}'),
        ("[1]", "[1, 2]"),
        ("{}", "{} {}"),
        ("0.1", "0.10000000000000001"),
    ],
)
def test_an_answer_that_is_not_the_shown_one_is_noticed(shown: str, given: str):
    assert fits(documents(shown), documents(shown.replace("…", "1")))
    assert not fits(documents(shown), documents(given))


def test_the_table_of_errors_is_the_codes():
    listed = {code: int(status) for status, codes, *_ in rows("README.md", "status") for code in quoted(codes)}
    assert listed == {code: kind.status for code, kind in KINDS.items()}


def test_the_table_of_settlement_is_the_table():
    words = {None: "-", True: "yes", False: "no"}
    charged = {None: "nothing, released", "reported": "the reported usage", "counted": "the counted usage"}
    expected = [
        [
            f"`{row.ending}`",
            words[row.reported],
            words[row.delivered],
            charged[row.charged],
            "-" if row.source is None else f"`{row.source}`",
        ]
        for row in TABLE
    ]
    assert rows("docs/settlement.md", "ending") == expected


def test_the_table_of_reasons_is_in_the_order_of_precedence():
    expected = [[f"`{reason}`", f"`{type(error_of(Rejected(reason))).__name__}`"] for reason in Reason]
    assert rows("docs/ledger.md", "reason, in order of precedence") == expected


def test_the_glossary_has_each_noun_once_and_in_order():
    nouns = [row[0] for row in rows("docs/glossary.md", "noun")]
    assert nouns == sorted(set(nouns), key=str.lower)
