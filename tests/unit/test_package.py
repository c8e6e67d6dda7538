"""What is installed is all that there is."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_room_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {file.parent.relative_to(ROOT) for file in ROOT.glob("dist_adv/**/__init__.py")}
    elsewhere = {name.replace("/", ".") for name in settings["package-dir"]}
    listed = set(settings["packages"]) - elsewhere
    assert {".".join(room.parts) for room in rooms} == listed
    assert "py.typed" in settings["package-data"]["dist_adv"]


def test_every_file_beside_the_modules_is_installed() -> None:
    """Templates, what they include, data."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [file for file in ROOT.glob("dist_adv/**/*.*") if file.suffix not in (".py", ".pyc")]
    assert files
    for file in files:
        room = ".".join(file.parent.relative_to(ROOT).parts)
        assert any(file.match(each) for each in settings["package-data"].get(room, ())), file
