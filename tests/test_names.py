"""What tables, figures and records call the data: the set's own short name, never a path, never another set's name."""

import json

import pytest
import torch
import yaml
from PIL import Image

from conftest import ROOT
from get_nb.lab import pipeline
from get_nb.lab.core import ConfigError
from get_nb.lab.data import load_data, load_split, short_name
from get_nb.lab.profiles import load_profile
from get_nb.lab.report import published_beside, read_published
from test_paper import run_here

COLOURS = dict(coat=(200, 60, 60), dress=(60, 60, 200), shoe=(120, 90, 30))


def write_clothes(folder, n=20, size=9):
    "A folder of plain pictures, a sub-folder per class."
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (size, size), tuple(min(255, c + 3 * i) for c in colour)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def wardrobe(tmp_path_factory):
    "Profile smoke, every stage of it, on a folder of clothes; -> folder of runs, folder of pictures."
    tmp = tmp_path_factory.mktemp("hidden-place")
    clothes = write_clothes(tmp / "clothes")
    spec = yaml.safe_load((ROOT / "nbs/paper/profiles/smoke.yaml").read_text(encoding="utf-8"))
    spec["defaults"]["data"] = f"folder:{clothes}@8"
    (tmp / "wardrobe.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("GET_NB_PROGRESS", "off")
        m.setenv("MPLBACKEND", "Agg")
        m.setattr(pipeline, "execute", run_here)
        threads = torch.get_num_threads()
        runs = pipeline.run_profile(ROOT, str(tmp / "wardrobe.yaml"), runs=tmp / "runs")
        torch.set_num_threads(threads)
    return runs, clothes


def products(runs):
    "The texts that every stage of the profile has made: file -> text."
    drawn = [p for p in runs.glob("*/*") if p.suffix in (".md", ".json", ".svg")]
    ours = {p for p in drawn if p.name not in ("stamp.json", "key.json")}
    return {p.relative_to(runs).as_posix(): p.read_text(encoding="utf-8") for p in ours}


def test_no_product_of_clothes_speaks_of_digits_or_cifar_or_says_where_the_pictures_lie(wardrobe):
    runs, clothes = wardrobe
    made = products(runs)
    assert {p.split("/")[0] for p in made} >= {n for n, s in load_profile(ROOT, "smoke").items() if s.draws}
    for name, text in made.items():
        text = text.replace('"digits":', "").replace("GET-digits/2", "").replace("ViT-digits/2", "")
        text = text.replace("unet-digits", "")  # names of presets
        for word in ("digits", "CIFAR", "cifar", str(clothes.parent), "@8"):
            assert word not in text, (name, word, text[max(0, text.find(word) - 80) :][:200])


def test_tables_of_clothes_say_what_they_are_about(wardrobe):
    runs, _ = wardrobe
    for table in ("table_2_conditional", "table_4_ablations", "table_6_families"):
        text = (runs / table / f"{table}.md").read_text(encoding="utf-8")
        assert "FD-clothes" in text and "clothes: 3 classes, 8x8 pixels, in colour" in text, table
    assert "generation on clothes" in (runs / "table_2_conditional/table_2_conditional.md").read_text(encoding="utf-8")
    axes = json.loads((runs / "figure_quality_compute/figure_quality_compute.json").read_text(encoding="utf-8"))
    assert axes and "FD-clothes" in (runs / "evaluate_get/record.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, called",
    [
        ("digits", "digits"),
        ("shapes", "shapes"),
        ("shapes@24", "shapes"),
        ("cifar10", "CIFAR-10"),
        ("cifar10-unverified", "CIFAR-10 (unverified)"),
        ("folder:{}", "clothes"),
        ("folder:{}/", "clothes"),
        ("folder:{}/../clothes@12", "clothes"),
    ],
)
def test_a_set_is_called_by_its_short_name(tmp_path, name, called):
    name = name.format(write_clothes(tmp_path / "there/clothes", n=10))
    assert short_name(name) == called
    if not name.startswith("cifar10"):
        assert load_split(name, "test", 0, 10).data == called


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [0, 12, 24])
def test_shapes_and_folders_have_the_size_and_shapes_the_number_that_were_asked_for(tmp_path, split, size):
    for s in (
        load_split(f"shapes@{size}" if size else "shapes", split, 1, 7),
        load_data("shapes", split, n=7, size=size),
    ):
        assert s.images.shape == (7, 3, size or 16, size or 16)
    clothes = write_clothes(tmp_path / "clothes", n=10)
    at = f"@{size}" if size else ""
    for s in (load_split(f"folder:{clothes}{at}", split, 1), load_data(f"folder:{clothes}", split, size=size)):
        assert s.shape == (3, size or 9, size or 9)


@pytest.mark.parametrize(
    "name, more, reason",
    [
        ("digits@16", {}, "digits have one size"),
        ("digits", dict(size=16), "digits have one size"),
        ("shapes@12", dict(size=24), "Give its size once"),
        ("shapes@0", {}, "after @ comes a size"),
        ("shapes@big", {}, "after @ comes a size"),
        ("clothes@12", {}, "unknown data set"),
    ],
)
def test_a_size_that_a_set_cannot_have_is_refused_by_name(name, more, reason):
    with pytest.raises(ConfigError) as e:
        load_data(name, **more)
    assert reason in str(e.value) and repr(name.partition("@")[0])[:-1] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("data", ["CIFAR-10", "CIFAR-10 (unverified)", "digits", "clothes"])
@pytest.mark.parametrize("distance", ["FID", "FD-CIFAR-10", "FD-clothes"])
def test_a_published_figure_stands_only_beside_the_same_data_and_distance(data, distance):
    table = read_published()
    beside = published_beside({"GET": "get-b-cond"}, table, dict(data=data, distance=distance))
    assert bool(beside) == (data == "CIFAR-10" and distance == "FID")
