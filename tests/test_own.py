"""A folder of somebody's own pictures becomes a profile that says why, has a price, and runs to a report about these pictures."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import ROOT, get_nb
from get_nb.lab import cli
from get_nb.lab.core import rng
from get_nb.lab.own import look_at, noise_levels
from get_nb.lab.profiles import load_profile
from get_nb.precond import is_denoiser


def draw(folder, classes=3, each=12, size=(16, 16), mode="L", contrast=255):
    "Pictures of a bright square, in a corner that depends on the class."
    g = rng("pictures", classes, each, contrast)
    for c in range(classes):
        (folder / f"class {c}").mkdir(parents=True)
        for i in range(each):
            x = g.integers(0, contrast // 2, (size[1], size[0], 3), dtype=np.uint8)
            x[c * 4 : c * 4 + 5, 2:8] = contrast
            image = Image.fromarray(x if mode == "RGB" else x[..., 0])
            image.save(folder / f"class {c}/{i}.png")
    return folder


def run(capsys, *words):
    with pytest.raises(SystemExit) as e:
        cli.main([str(w) for w in words])
    out = capsys.readouterr()
    return e.value.code or 0, out.out, out.err


@pytest.mark.parametrize(
    "size, mode, asked, side, patch",
    [
        ((16, 16), "L", 0, 16, 2),
        ((30, 30), "RGB", 0, 28, 4),
        ((40, 60), "L", 32, 32, 4),
        ((9, 9), "L", 0, 8, 2),
        ((128, 128), "RGB", 64, 64, 8),
    ],
)
def test_a_profile_fits_the_pictures_and_says_why(size, mode, asked, side, patch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = draw(tmp_path / "pics", size=size, mode=mode)
    (folder / "class 0/!notes.txt").write_text("no picture", encoding="utf-8")
    code, out, err = run(capsys, "new", "mine", "--data", "folder:pics", "--root", ROOT, "--size", asked)
    assert code == 0, err
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    stages = load_profile(ROOT, str(tmp_path / "mine.yaml"))
    assert yaml.safe_load(text)["defaults"]["data"] == f"folder:{folder}@{side}"
    look = look_at(folder, side)
    p_mean, p_std = noise_levels(look.sigma_data, side)
    assert (stages["teacher"].params["p_mean"], stages["teacher"].params["p_std"]) == (p_mean, p_std)
    assert stages["get"].params["overrides"]["patch"] == patch and look.shape == (3 if mode == "RGB" else 1, side, side)
    for said in (
        f"sigma_data {look.sigma_data}",
        f"p_mean {p_mean}",
        "36 pictures",
        "Price on",
        "| pairs |",
        "lr 0.004",
    ):
        assert said in out, said
    assert f"sigma_data = {look.sigma_data}" in text and "not searched for on these pictures" in text
    assert "get-nb reproduce --profile mine.yaml" in out
    assert sorted(os.listdir(tmp_path)) == ["mine.yaml", "pics"]


def test_a_name_of_a_profile_of_ours_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "pics")
    code, _, err = run(capsys, "new", "cpu", "--data", "folder:pics", "--root", ROOT, "--size", 8)
    assert code == 2 and err.count("\n") == 1 and "name 'cpu': a profile of get_nb is named so" in err
    assert not (tmp_path / "cpu.yaml").exists()


def test_a_gpu_gets_larger_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a GPU")
    draw(tmp_path / "pics", size=(64, 64), mode="RGB")
    code, out, err = run(capsys, "new", "mine", "--data", "folder:pics", "--root", ROOT)
    stages = load_profile(ROOT, str(tmp_path / "mine.yaml"))
    assert stages["get"].params["model"] == "GET-T/2" and stages["get"].params["device"] == "cuda", err
    assert stages["teacher"].params["data"].endswith("@64")


def test_noise_levels_move_with_the_contrast_and_with_the_size():
    assert noise_levels(0.5, 32) == (-1.2, 1.2)
    assert noise_levels(0.25, 32)[0] == pytest.approx(-1.2 - np.log(2), abs=0.01)
    assert noise_levels(0.5, 64)[0] == pytest.approx(-1.2 + np.log(2), abs=0.01)


def test_what_is_odd_in_pictures_is_told(tmp_path):
    folder = draw(tmp_path / "pics", each=30)
    Image.new("L", (16, 16), 7).save(folder / "class 0/plain.png")
    Image.new("L", (8, 24), 200).resize((8, 24)).save(folder / "class 0/tall.png")
    for i in range(2):
        (folder / f"class 1/copy{i}.png").write_bytes((folder / "class 1/3.png").read_bytes())
    (folder / "rare").mkdir()
    for i in range(5):
        Image.fromarray(rng("rare", i).integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / f"rare/{i}.png")
    for i in range(40):
        (folder / f"class 2/more{i}.png").write_bytes((folder / "class 2/1.png").read_bytes())
    (folder / "class 2/._0.png").write_bytes(b"left by a system, no picture")
    told = "; ".join(look_at(folder).findings)
    for said in (
        "1 of 139 pictures are not square",
        "1 of 139 pictures are smaller than 16 pixels",
        "42 of 139 pictures are the same as another",
        "2 of 139 pictures show one colour only",
        "class 'rare' has 5 pictures, class 'class 2' has 70",
        "139 pictures are few",
    ):
        assert said in told, told


WRONG = {
    "new a/b --data folder:pics": "letters, digits, _ and -",
    "new taken --data folder:pics": "is there already",
    "new mine --data pics": "folder:PATH",
    "new mine --data folder:nowhere": "there is no such folder",
    "new mine --data folder:videos": "no images in its sub-folders",
    "new mine --data folder:one": "one class, 'class 0'",
    "new mine --data folder:few": "has 2 pictures, at least 5 are needed",
    "new mine --data folder:broken": "3.png",
    "new mine --data folder:pics --size 30": "a multiple of 4 from 8 to 128",
    "new mine --data folder:pics@16 --size 28": "give the size once",
    "new mine": "Missing option '--data'",
}


@pytest.mark.parametrize("typed", WRONG)
def test_pictures_that_cannot_be_used_are_one_line_and_no_file(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "pics")
    draw(tmp_path / "one", classes=1)
    draw(tmp_path / "few", each=2)
    draw(tmp_path / "broken")
    (tmp_path / "broken/class 1/3.png").write_bytes(b"no picture")
    (tmp_path / "videos/a").mkdir(parents=True)
    (tmp_path / "videos/a/clip.mp4").write_bytes(b"film")
    (tmp_path / "taken.yaml").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *typed.split(), "--root", ROOT)
    assert code == 2 and not out and len(err.splitlines()) == 1 and WRONG[typed] in err, err
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken.yaml").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_the_whole_chain_runs_on_a_folder_of_pictures_and_reports_about_them(tmp_path):
    draw(tmp_path / "squares", each=40, size=(12, 12))
    profile = tmp_path / "mine.yaml"
    code = "from pathlib import Path; from get_nb.lab.own import write_profile; import sys;"
    code += "write_profile('mine', f'folder:{sys.argv[1]}/squares', Path('.'), quick=True, folder=sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)
    done = get_nb("reproduce", "--profile", profile, "--runs", tmp_path / "runs", "--cores", 1)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "runs/mine/table_2_conditional/table_2_conditional.md").read_text(encoding="utf-8")
    assert "FD-squares" in table and "3 classes, 8x8 pixels, grey" in table and "digits" not in table
    assert "digits" not in (tmp_path / "runs/mine/figure_samples/notebook.html").read_text(encoding="utf-8")[-20_000:]


def test_progress_stays_out_of_standard_output_where_ipykernel_is_merely_imported():
    code = "import ipykernel; from get_nb.lab.core import progress; print(sum(progress(range(3))))"
    env = {**os.environ, "GET_NB_PROGRESS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize(
    "config", [None, "unet", ["teacher"], dict(builder="model"), SimpleNamespace(builder="teacher")]
)
def test_only_a_config_that_says_so_makes_a_denoiser(config):
    model = torch.nn.Identity()
    model.config = config
    assert not is_denoiser(model)
    model.config = dict(builder="teacher")
    assert is_denoiser(model)
