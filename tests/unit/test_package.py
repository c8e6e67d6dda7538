"""What is installed is all that there is, and what is released has one version."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dist_adv import __version__

ROOT = Path(__file__).parents[2]


def test_every_room_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {file.parent.relative_to(ROOT) for file in ROOT.glob("dist_adv/**/__init__.py")}
    elsewhere = {name.replace("/", ".") for name in settings["package-dir"]}
    listed = set(settings["packages"]) - elsewhere
    assert {".".join(room.parts) for room in rooms} == listed
    assert "py.typed" in settings["package-data"]["dist_adv"]


def test_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.parametrize(("tag", "status"), [(f"v{__version__}", 0), ("v9.9.9", 1), ("main", 1)])
def test_a_tag_releases_its_own_version_only(tag: str, status: int) -> None:
    """The step of the workflow, as it is."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    names = [step.get("name") for step in workflow["jobs"]["build"]["steps"]]
    step = workflow["jobs"]["build"]["steps"][names.index("Compare the tag with the version")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert (f"tag v{__version__}" in done.stdout) == bool(status)
