"""The package of docs/extending.md, written, installed and used as somebody would."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def configuration() -> dict[str, Any]:
    """The one that the document begins with."""
    return yaml.safe_load(blocks("yaml")[0])


def write_package(folder: Path) -> None:
    """Each block to the file that its first line names."""
    (folder / "mine").mkdir()
    (folder / "mine" / "__init__.py").touch()
    for text in [*blocks("python"), *blocks("toml")]:
        first, rest = text.split("\n", 1)
        (folder / first.removeprefix("# ")).write_text(rest)


def install(folder: Path) -> None:
    """Put the package into `folder`, as pip installs it, entry points included."""
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir()
    write_package(source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([*pip, str(source)], check=True)
    (folder / "from_python.py").write_text((source / "from_python.py").read_text())
