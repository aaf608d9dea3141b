"""The installed package needs no development package, and its command is there."""

import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT

BLOCKED = ["nbdev", "execnb", "fastcore", "ghapi", "jupyterlab", "pytest", "ruff", "pre_commit"]
PROBE = f"""
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}: raise ImportError(name + " is a development package")
sys.meta_path.insert(0, Refuse())
import get_nb
assert get_nb.__file__.startswith(sys.argv[1]), get_nb.__file__
names = [m.name for m in pkgutil.iter_modules(get_nb.__path__) if not m.name.startswith("_")]
for n in names: importlib.import_module("get_nb." + n)
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
    assert {"core", "models", "solvers", "sampler", "unet", "pairs", "files", "cli"} <= set(done.stdout.split())
