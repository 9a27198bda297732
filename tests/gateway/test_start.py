"""What a gateway needs before it serves."""

from pathlib import Path

import pytest

from gateway.app import Gateway
from gateway.migrations import migrate
from gateway.settings import Settings


async def test_a_journal_folder_that_cannot_be_made_shows_at_start(tmp_path: Path) -> None:
    database_url = f"sqlite:///{tmp_path / 'farebox.db'}"
    migrate(database_url)
    in_the_way = tmp_path / "journal"
    in_the_way.touch()
    gateway = Gateway(Settings(database_url=database_url, journal_dir=in_the_way))
    with pytest.raises(FileExistsError):
        await gateway.start()
    await gateway.stop()
