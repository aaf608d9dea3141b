"""The package's metadata, read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

s = ConfigParser(delimiters=["="])
s.read("settings.ini", encoding="utf-8")
cfg = s["DEFAULT"]
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["get_nb", "get_nb.*"]),
    package_data={"get_nb": ["*.pyi", "py.typed"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "tensorboard", "perceptual", "diffusers", "gdd", "cluster")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
