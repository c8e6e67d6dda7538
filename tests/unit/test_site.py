"""The site is not built with a dead link, nor with a public name without a page or a docstring."""

import shutil
import subprocess
import sys
from pathlib import Path

import dist_adv

DOCS = Path(__file__).parents[2] / "docs"


def test_a_dead_link_and_names_without_a_page_fail_the_build(tmp_path: Path) -> None:
    """One page in place of all, which take half a minute (`make site`)."""
    (tmp_path / "docs").mkdir()
    shutil.copytree(DOCS / "_templates", tmp_path / "docs" / "_templates")
    shutil.copy(DOCS / "keys.py", tmp_path / "docs")
    conf = (DOCS / "conf.py").read_text()
    (tmp_path / "docs" / "conf.py").write_text(f"{conf}\ndist_adv.ModelOptions.__doc__ = None\n")
    page = "# A page\n\n[gone](gone.md)\n\n```{eval-rst}\n.. autofunction:: dist_adv.train\n"
    page += ".. autoclass:: dist_adv.ModelOptions\n```\n"
    (tmp_path / "docs" / "index.md").write_text(page)
    sphinx = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-c", "docs"]
    built = subprocess.run(
        [*sphinx, ".", "site"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 1
    assert "gone.md" in built.stderr
    for name in dist_adv.__all__:
        said = f"dist_adv.{name} is not documented" in built.stderr
        assert said == (name not in ("__version__", "train")), name
