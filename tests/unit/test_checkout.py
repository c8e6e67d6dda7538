"""The commit that is recorded is that of the code which runs, or none: real repositories of git."""

import os
import subprocess
from pathlib import Path

import pytest

from dist_adv.runs import environment
from dist_adv.runs.environment import checkout, git_commit


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "safe.directory=*"]
    done = subprocess.run(
        ["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a commit of its own, and virtual environments left out."""
    monkeypatch.setenv("HOME", str(tmp_path))  # no settings of whoever runs the tests
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text(".venv\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "mine")
    return folder


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this code lie in `folder`."""
    code = folder / "dist_adv" / "runs" / "environment.py"
    code.parent.mkdir(parents=True)
    code.write_text(Path(environment.__file__).read_text())
    monkeypatch.setattr(environment, "__file__", str(code))
    return code


def test_installed_inside_of_another_repository(repository: Path, monkeypatch) -> None:
    """Ignored by git, as a virtual environment is, or only not added to it."""
    for folder in (".venv/site-packages", "lib"):
        with monkeypatch.context() as patch:
            installed(repository / folder, patch)
            assert checkout() is None
            assert git_commit() is None


def test_checkout_and_changes(repository: Path, monkeypatch) -> None:
    code = installed(repository, monkeypatch)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "with the code")
    head = git(repository, "rev-parse", "--short=12", "HEAD")
    assert checkout() == repository
    assert git_commit() == head
    link = repository.parent / "link"
    link.symlink_to(repository)
    monkeypatch.setattr(environment, "__file__", str(link / "dist_adv" / "runs" / "environment.py"))
    assert git_commit() == head
    code.write_text("# changed\n")
    assert git_commit() == f"{head}-dirty"


def test_variables_of_a_hook(repository: Path, tmp_path: Path, monkeypatch) -> None:
    """GIT_DIR names the repository whose hook started this."""
    installed(tmp_path / "site-packages", monkeypatch)
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "site-packages"))
    assert git_commit() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_repository_of_another_owner(repository: Path, monkeypatch) -> None:
    """As where a container mounts it: git refuses it, and its code runs already."""
    installed(repository, monkeypatch)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "with the code")
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 65534, 65534)
    assert git_commit() == git(repository, "rev-parse", "--short=12", "HEAD")


def test_without_git(repository: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
