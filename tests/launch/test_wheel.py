"""A wheel has what a checkout has of the package, the experiments and the launchers, and no more.

Built offline from the files that git knows, through a source distribution; or the one that
DIST_ADV_WHEEL names, which `make wheel` has made.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dist_adv
from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.sweeps.sweep import load_sweep

ROOT = Path(__file__).parents[2]
# Folders of a checkout that are installed, and where.
INSTALLED = {"dist_adv": "dist_adv", "configs": "dist_adv/configs", "launch": "dist_adv/launch"}
BUILD = """
import os, sys, tarfile
from setuptools import build_meta
out = sys.argv[1]  # setuptools has arguments of its own there
made = os.path.join(out, build_meta.build_sdist(out))
with tarfile.open(made) as whole:
    whole.extractall(out, filter="data")
os.chdir(made.removesuffix(".tar.gz"))
build_meta.build_wheel(out)
"""


def known_to_git() -> list[str]:
    """Files that are tracked, or that would be: of a checkout, not of a build before."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others"]
    done = subprocess.run(
        [*command, "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    given = os.environ.get("DIST_ADV_WHEEL")
    if given:
        return zipfile.ZipFile(ROOT / given)
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("out")
    for name in known_to_git():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = out.glob("*.whl")
    return zipfile.ZipFile(made)


def test_everything_is_in_it_as_it_is(wheel: zipfile.ZipFile) -> None:
    expected = {}
    for name in known_to_git():
        folder, _, rest = name.partition("/")
        if folder in INSTALLED:
            expected[f"{INSTALLED[folder]}/{rest}"] = (ROOT / name).read_bytes()
    assert {"dist_adv/py.typed", "dist_adv/launch/run.sh", "dist_adv/configs/base.yaml"} <= set(
        expected
    )
    found = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def test_launchers_can_be_run(wheel: zipfile.ZipFile) -> None:
    for info in wheel.infolist():
        source = ROOT / "launch" / info.filename.removeprefix("dist_adv/launch/")
        if info.filename.startswith("dist_adv/launch/"):
            assert bool(info.external_attr >> 16 & 0o100) == os.access(source, os.X_OK), source


def test_what_it_says_of_itself(wheel: zipfile.ZipFile) -> None:
    about = f"dist_adv-{dist_adv.__version__}.dist-info"
    said = Parser().parsestr(wheel.read(f"{about}/METADATA").decode())
    assert (said["Name"], said["Version"]) == ("dist-adv", dist_adv.__version__)
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "MIT"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload() == (ROOT / "README.md").read_text()
    assert "dist-adv = dist_adv.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()


def test_configurations_that_come_with_it_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is one of that name."""
    monkeypatch.chdir(tmp_path)
    name = "configs/digits/fast.yaml"
    assert load_config(name) == load_config(ROOT / name)
    sweep = Path("configs/sweeps/digits.yaml")
    assert load_sweep(sweep).runs == load_sweep(ROOT / sweep).runs
    for absent in ("configs/digits/fats.yaml", "digits/fast.yaml", "other/configs/base.yaml"):
        with pytest.raises(UserError, match=rf"^{absent}: no such configuration file"):
            load_config(absent)
    (tmp_path / "configs" / "digits").mkdir(parents=True)
    (tmp_path / name).write_text("method: {name: natural}")
    assert load_config(name).method.name == "natural"
