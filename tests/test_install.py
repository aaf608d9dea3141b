"""The installed package, outside of a clone, needs no development package; it makes a model, and its command is there."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

from conftest import ROOT

BLOCKED = ["nbdev", "execnb", "fastcore", "ghapi", "jupyterlab", "ipywidgets", "pytest", "ruff", "pre_commit"]
PROBE = f"""
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}: raise ImportError(name + " is a development package")
sys.meta_path.insert(0, Refuse())
import get_nb
assert get_nb.__file__.startswith(sys.argv[1]), get_nb.__file__
names = [m.name for p in ("get_nb", "get_nb.lab") for m in pkgutil.iter_modules(importlib.import_module(p).__path__, p + ".")]
for n in names: importlib.import_module(n)
for n in get_nb.__all__: getattr(get_nb, n)
model = get_nb.create_model("GET-digits/2", image_size=8, channels=1)
import torch
assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 1, 8, 8)
assert get_nb.load_checkpoint("digits-get").config["name"] == "GET-digits/2"
from get_nb.lab.shipped import verify_shipped
verify_shipped()
from get_nb.lab.cli import main
try: main(["--help"])
except SystemExit as e: assert not e.code
print(*names)
"""


def test_the_wheel_imports_without_any_development_package(tmp_path):
    clone = tmp_path / "clone"  # a build folder left in the clone could hold modules that no longer exist
    shutil.copytree(
        ROOT, clone, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "results", "build", "*.egg-info", "tests")
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."],
        cwd=clone,
        check=True,
    )
    wheel = next(tmp_path.glob("get_nb-*.whl"))
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
        entry = next(n for n in z.namelist() if n.endswith("entry_points.txt"))
        assert "get-nb = get_nb.lab.cli:main" in z.read(entry).decode().replace("get-nb=get", "get-nb = get")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert {"get_nb.get", "get_nb.solvers", "get_nb.lab.core", "get_nb.lab.cli"} <= set(done.stdout.split())
    assert "Usage:" in done.stdout


def test_the_package_promises_no_system_whose_modules_it_does_without():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    systems = [c for c in about["classifiers"] if c.startswith("Operating System")]
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "get_nb").rglob("*.py"))
    posix = re.findall(r"^import (pwd|resource|fcntl|grp|termios)$", code, re.M)
    assert not posix or systems == ["Operating System :: POSIX :: Linux"]
