"""What users have reported: each test names what must not happen again; siblings of a fault share its test."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageFile

import get_nb
from conftest import ROOT
from get_nb.lab import pipeline, publishing
from get_nb.lab.archives import read_torch
from get_nb.lab.cifar import data_folder
from get_nb.lab.classifier import create_classifier
from get_nb.lab.cli import cli
from get_nb.lab.core import ConfigError, FileError, find_root, is_main, nearest
from get_nb.lab.data import load_data, short_name
from get_nb.lab.diffusers import _side, load_diffusers
from get_nb.lab.evaluate import _load_kind, _refuse_other_data, evaluate_checkpoint, sample_to_file
from get_nb.lab.files import load_tensors, save_checkpoint, write_json
from get_nb.lab.folders import load_folder, read_picture
from get_nb.lab.generation import merge_pairs
from get_nb.lab.imports import import_file
from get_nb.lab.metrics import load_statistics
from get_nb.lab.own import look_at
from get_nb.lab.parameters import read_yaml
from get_nb.lab.profiles import demo_clone, load_profile
from get_nb.lab.publishing import publish_profile
from get_nb.lab.records import save_record
from get_nb.lab.schedule import TrainConfig
from get_nb.lab.stages import profile_runs, runs_folder, stage_key
from get_nb.lab.store import PairDataset, save_pairs, verify_pairs
from get_nb.lab.train import train


@pytest.fixture
def clone(tmp_path):
    "A clone in miniature."
    return demo_clone(tmp_path / "clone")


@pytest.fixture
def written(monkeypatch):
    "Stages write what the demo's notebooks would, without a kernel."

    def execute(stage, parameters, folder, cwd):
        shutil.copyfile(stage.notebook, folder / "notebook.ipynb")
        if stage.draws:
            (folder / f"{stage.name}.json").write_text("{}")
        else:
            save_record(folder, dict(total=parameters["n"]))

    def page(notebook, path, *_):
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(notebook, path)

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(publishing, "_write_page", page)


@pytest.mark.parametrize(
    "variables, main",
    [
        (dict(RANK="1"), True),  # left behind by another launcher
        (dict(RANK="1", WORLD_SIZE="1"), True),
        (dict(RANK="1", WORLD_SIZE=""), True),
        (dict(RANK="0", WORLD_SIZE="2"), True),
        (dict(RANK="1", WORLD_SIZE="2"), False),
    ],
)
def test_a_rank_alone_does_not_keep_files_from_being_written(variables, main, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_main() == main
    save_checkpoint(tmp_path / "model.safetensors", get_nb.create_model("GET-digits/2", image_size=8, channels=1))
    save_record(tmp_path / "stage", dict(a=1))
    assert (tmp_path / "model.safetensors").is_file() == (tmp_path / "stage/record.json").is_file() == main


def test_a_kernel_does_not_inherit_the_launchers_variables(clone, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(pipeline, "_papermill", lambda source, notebook, parameters, cwd, env, log: seen.update(env))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    pipeline.execute(load_profile(clone, "demo")["square_3"], {}, tmp_path, clone)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & seen.keys() and "PATH" in seen


def test_a_stage_that_leaves_nothing_is_not_done_and_keeps_its_checkpoints(clone, monkeypatch):
    stage, runs = load_profile(clone, "demo")["square_3"], runs_folder(clone, "demo")
    state = runs / "square_3/state/step-3"

    def execute(stage, parameters, folder, cwd):
        state.mkdir(parents=True)

    monkeypatch.setattr(pipeline, "execute", execute)
    with pytest.raises(pipeline.StageError, match="square_3 failed: .* left no file"):
        pipeline.run_stage(stage, stage_key(stage, runs), clone, runs)
    assert state.is_dir() and not (runs / "square_3/stamp.json").exists()


def test_two_profiles_of_one_file_name_do_not_share_runs_or_results(clone, written, monkeypatch):
    text = (clone / "nbs/paper/profiles/demo.yaml").read_text()
    for folder in ("pa", "pb"):
        (clone / folder).mkdir()
        (clone / folder / "p.yaml").write_text(text)
    first, second = (str(clone / folder / "p.yaml") for folder in ("pa", "pb"))
    folder = pipeline.run_profile(clone, first)
    for use in (pipeline.run_profile, profile_runs, publish_profile):
        with pytest.raises(ConfigError, match=r"runs/p belongs to pa/p.yaml, not to pb/p.yaml: rename yours"):
            use(clone, second)
    assert (folder / "square_3/stamp.json").is_file()
    publish_profile(clone, first)
    other = clone / "elsewhere"
    pipeline.run_profile(clone, second, runs=other)
    with pytest.raises(ConfigError, match=r"results/p belongs to pa/p.yaml, not to pb/p.yaml"):
        publish_profile(clone, second, runs=other)
    monkeypatch.chdir(clone)
    assert profile_runs(clone, "pa/p.yaml") == folder
    moved = clone.rename(clone.with_name("moved"))
    assert "published 3 stages" in publish_profile(moved, str(moved / "pa/p.yaml"))
    (moved / "pa/p.yaml").unlink()
    assert runs_folder(moved, str(moved / "pb/p.yaml")) == moved / "runs/p"


def test_a_tensor_saved_with_torchs_flags_is_refused_not_read_with_the_wrong_sign(tmp_path):
    x = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    for name, layout in (("zip.pt", True), ("legacy.pt", False)):
        torch.save(dict(w=x), tmp_path / name, _use_new_zipfile_serialization=layout)
        with pytest.raises(FileError, match=r"flags \(negative or conjugate\).*x.resolve_neg\(\)"):
            read_torch(tmp_path / name)
        torch.save(dict(w=x.resolve_neg()), tmp_path / name, _use_new_zipfile_serialization=layout)
        assert read_torch(tmp_path / name)["w"].tolist() == [-1, -1, -1]


def test_merged_pairs_are_files_even_if_the_shards_were_links(tmp_path):
    x = torch.zeros(3, 1, 8, 8)
    save_pairs(tmp_path / "real", x, x, first_seed=0)
    (tmp_path / "linked").mkdir()
    for p in (tmp_path / "real").iterdir():
        (tmp_path / "linked" / p.name).symlink_to(f"../real/{p.name}")
    merge_pairs([tmp_path / "linked"], tmp_path / "merged/all")
    assert len(PairDataset(tmp_path / "merged/all")) == 3
    assert not any(p.is_symlink() for p in (tmp_path / "merged/all").iterdir())


def pictures(folder, size=8):
    "Five pictures, all different, in a folder."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(5):
        Image.fromarray(np.full((size, size), 40 * i, np.uint8)).save(folder / f"img{i:08d}.png")


def test_a_folder_of_edms_tool_has_the_classes_that_its_list_says(tmp_path, capsys):
    for part in ("00000", "00001"):
        pictures(tmp_path / "edm" / part)
    names = [f"{p.parent.name}/{p.name}" for p in sorted(tmp_path.glob("edm/*/*.png"))]

    def listed(labels):
        (tmp_path / "edm/dataset.json").write_text(json.dumps(dict(labels=labels)), encoding="utf-8-sig")
        return load_data(f"folder:{tmp_path}/edm", "train"), load_folder(tmp_path / "edm", "all")

    _, everything = listed([[n, (2, 10)[i % 2]] for i, n in enumerate(names)])
    assert everything.classes == ("02", "10") and everything.labels.tolist() == [0, 1] * 5
    assert listed(None)[1].classes == ("0",)
    assert "dataset.json" not in capsys.readouterr().err
    for wrong in ([[n, 0] for n in names[1:]], [[n, [0.5]] for n in names], [[n, -1] for n in names], {"a": 1}, [3]):
        with pytest.raises(FileError, match=r"dataset.json: (names no class|not EDM's list)"):
            listed(wrong)


def test_damaged_pictures_are_refused_whatever_other_libraries_let_pass(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        read_picture(tmp_path / name)
        damaged = [whole[: len(whole) // 2]]
        if name.endswith("png"):
            at = whole.index(b"IDAT") + 4 + 200
            damaged += [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]]
        for content in damaged:
            (tmp_path / f"b-{name}").write_bytes(content)
            for lenient in (False, True):
                monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
                with pytest.raises(FileError, match="not an image that can be read"):
                    read_picture(tmp_path / f"b-{name}")
                assert ImageFile.LOAD_TRUNCATED_IMAGES == lenient


def test_two_classes_never_have_one_visible_name(tmp_path):
    for form in ("NFC", "NFD"):
        pictures(tmp_path / "d" / unicodedata.normalize(form, "café"))
    with pytest.raises(FileError, match=r"'cafe\\u0301' and 'caf\\xe9' look the same"):
        load_folder(tmp_path / "d", "all")


def test_a_folder_that_is_not_there_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "edm.zip").write_bytes(b"PK")
    pictures(tmp_path / "d@28/a")
    pictures(tmp_path / "home/mine/a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, said in (
        ("folder:birds", f"no such folder; a path that does not begin with / is looked for in {tmp_path}"),
        ("folder:edm.zip", "there is no such folder, but a file; if it is an archive, unpack it"),
        ("folder:d@28", "to name the folder d@28, append a slash"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_data(name, "train")
    assert len(load_data("folder:d@28/", "train")) == len(load_data("folder:~/mine", "train")) == 4


def test_what_a_link_leads_to_is_written_and_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "new.json").symlink_to("disk/new.json")
    (tmp_path / "disk/old.json").write_text("0")
    (tmp_path / "old.json").symlink_to("disk/old.json")
    for name in ("new.json", "old.json"):
        write_json(name, [1])
        assert (tmp_path / name).is_symlink() and json.loads((tmp_path / "disk" / name).read_text()) == [1]
    x = torch.zeros(2, 1, 8, 8)
    write_json("~/a.json", 1)
    save_pairs("~/pairs", x, x, first_seed=0)
    save_checkpoint("~/t.safetensors", get_nb.create_model("GET-digits/2", image_size=8, channels=1))
    assert len(PairDataset("~/pairs")) == 2 and verify_pairs("~/pairs") == []
    merge_pairs(["~/pairs"], "~/merged")
    get_nb.load_checkpoint("~/t.safetensors")
    pictures(tmp_path / "home/data/a")
    monkeypatch.setenv("GET_NB_DATA", "~/data")
    assert data_folder() == tmp_path / "home/data" and len(load_folder("~/data", "all")) == 5
    demo_clone(tmp_path / "home/clone")
    assert find_root("~/clone") == tmp_path / "home/clone"
    assert profile_runs(tmp_path, "cpu", "~/runs") == tmp_path / "home/runs/cpu"
    assert not (tmp_path / "~").exists()


def test_no_device_is_replaced_by_a_file_and_long_names_are_kept(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for device in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(FileError, match="name a file"):
            write_json(device, 1)
    write_json(tmp_path / ("é" * 125 + ".json"), 1)
    with pytest.raises(OSError) as e:
        write_json(tmp_path / ("a" * 256), 1)
    assert e.value.filename == str(tmp_path / ("a" * 256))


def test_tied_weights_are_saved_and_come_back_tied(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
            self.b.weight, self.config = self.a.weight, dict(builder="tied")

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied()
    save_checkpoint(tmp_path / "tied.safetensors", model)
    assert (load_tensors(tmp_path / "tied.safetensors")[0]["b.weight"] == model.a.weight).all()
    x = torch.randn(8, 3)
    cfg = dict(lr=1e-2, batch_size=8, checkpoint_every=2)

    def loss(model, step, share):
        return model(x).square().mean()

    train(model, loss, TrainConfig(steps=2, **cfg), tmp_path / "state")
    resumed = Tied()
    train(resumed, loss, TrainConfig(steps=2, **cfg), tmp_path / "state")
    assert resumed.a.weight is resumed.b.weight and torch.equal(resumed.a.weight, model.a.weight)


def test_statistics_that_are_no_covariance_are_refused(tmp_path):
    for i, sigma in enumerate(([[1, 5], [5, 1]], [[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])):
        np.savez(tmp_path / f"{i}.npz", mu=np.zeros(len(sigma)), sigma=np.array(sigma, float))
        with pytest.raises(FileError, match="sigma is not a covariance: .* is the variance along one direction"):
            load_statistics(tmp_path / f"{i}.npz")
    few = np.random.default_rng(0).normal(size=(20, 100))
    np.savez(tmp_path / "few.npz", mu=few.mean(0), sigma=np.cov(few, rowvar=False).astype(np.float32))
    load_statistics(tmp_path / "few.npz")


def test_a_classifier_of_other_data_measures_no_distance_of_these(tmp_path):
    classifier = create_classifier(num_classes=2, width=4, image_size=8, channels=1)
    save_checkpoint(tmp_path / "cats.safetensors", classifier, data="my cats/train")
    with pytest.raises(ConfigError, match="cats.safetensors: a classifier of 'my cats', compared with 'digits'"):
        evaluate_checkpoint("digits-get", str(tmp_path / "cats.safetensors"), samples=10, device="cpu")
    (tmp_path / "my cats").mkdir()
    _refuse_other_data([tmp_path / "cats.safetensors"], short_name(f"folder:{tmp_path}/my cats"))


ODD = {
    "a view read backwards": lambda a: a[:, :, ::-1],
    "big-endian": lambda a: a.astype(">f4"),
    "long doubles": lambda a: a.astype(np.longdouble),
    "not contiguous": lambda a: a.transpose(0, 1, 3, 2),
    "torch's negative flag": lambda a: torch.complex(torch.zeros(a.shape), torch.from_numpy(-a)).conj().imag,
}


@pytest.mark.parametrize("odd", ODD)
def test_pairs_are_saved_from_any_dense_array(odd, tmp_path):
    a = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    x = ODD[odd](a)
    save_pairs(tmp_path / "p", x, x, np.arange(4)[::-1].astype(">i8"), first_seed=np.int64(5), num_classes=np.int64(5))
    found = PairDataset(tmp_path / "p")[:]
    wanted = np.array(x.resolve_neg().numpy() if torch.is_tensor(x) else x, np.float32)
    assert (found["noise"].numpy() == wanted).all() and np.allclose(found["image"], wanted)
    assert found["label"].tolist() == [3, 2, 1, 0] and found["seed"].tolist() == [5, 6, 7, 8]


def test_pairs_that_are_not_what_is_said_are_refused(tmp_path):
    x = torch.zeros(4, 1, 8, 8)
    masked = np.ma.masked_array(x.numpy(), mask=np.ones(x.shape, bool))
    for odd in (masked, x.to_sparse()):
        for noise, image in ((odd, x), (x, odd)):
            with pytest.raises(FileError, match="must be dense and without a mask"):
                save_pairs(tmp_path / "p", noise, image)
    for recipe in (dict(n=5), dict(shape=[1, 2, 8])):
        with pytest.raises(ConfigError, match=r"(n|shape) = .*: that of the arrays is"):
            save_pairs(tmp_path / "p", x, x, **recipe)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/.DS_Store").touch()
    save_pairs(tmp_path / "p", x, x, n=4, shape=(1, 8, 8))


def test_a_manifest_that_says_other_shapes_than_the_shards_is_refused(tmp_path):
    x = torch.zeros(10, 1, 8, 8)
    save_pairs(tmp_path, x, x, first_seed=0, shard_size=5)
    PairDataset(tmp_path)
    path = tmp_path / "manifest.json"
    m = json.loads(path.read_text())
    path.write_text(json.dumps(m), encoding="utf-8-sig")
    PairDataset(tmp_path)
    longer = [dict(s, pairs=20) for s in m["shards"]]
    for wrong in (dict(m, shards=longer), dict(m, recipe=dict(m["recipe"], shape=[1, 4, 16]))):
        path.write_text(json.dumps(wrong))
        with pytest.raises(FileError, match="pairs-00000.safetensors: its .* is of shape .*, by the manifest"):
            PairDataset(tmp_path)


def test_a_data_set_of_pairs_stays_where_it_was_and_says_when_it_is_gone(tmp_path, monkeypatch):
    x = torch.zeros(4, 1, 8, 8)
    save_pairs(tmp_path / "p", x, x)
    monkeypatch.chdir(tmp_path)
    data = PairDataset("p")
    monkeypatch.chdir("/")
    assert len(data[:]["image"]) == 4
    data = PairDataset(tmp_path / "p")
    shutil.rmtree(tmp_path / "p")
    with pytest.raises(FileError, match="pairs-00000.safetensors: cannot be read .* is the folder still there"):
        data[0]


def test_numbers_of_numpy_may_be_noted_in_checkpoints(tmp_path):
    model = get_nb.create_model("GET-digits/2", image_size=8, channels=1)
    save_checkpoint(
        tmp_path / "m.safetensors", model, fd=np.float32(1.5), steps=np.int64(3), more=dict(a=[np.bool_(1)])
    )
    assert get_nb.load_checkpoint(tmp_path / "m.safetensors").meta == dict(fd=1.5, steps=3, more=dict(a=[True]))
    write_json(tmp_path / "a.json", dict(a=np.int64(1)))


def test_the_nearest_name_is_the_same_word_in_other_letters_if_there_is_one():
    for word, options, near in (
        ("Digits-GET", ["digits-vit", "digits-get", "digits-teacher"], "digits-get"),
        ("GET-b/2", ["GET-T/2", "GET-B/2"], "GET-B/2"),
        ("CPU", ["cpu-full", "cpu", "gpu"], "cpu"),
    ):
        assert nearest(word, options) == f"; did you mean {near!r}?"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed, tmp_path):
    out = tmp_path / "a.json"
    code = (
        "import sys; from get_nb.lab.surroundings import soften_streams; soften_streams(); f = open(sys.argv[1], 'w');"
        "print('said'); print('said', file=sys.stderr); print(f.fileno() > 2, file=f); sys.stdin.read(0)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {shlex.quote(str(out))} {closed}"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0
    assert out.read_text() == "True\n"


def test_an_output_that_has_gone_away_is_named(tmp_path):
    code = "import sys; from get_nb.lab.cli import main; main(['stages', '--json'])"
    full = "get-nb: standard output: No space left on device\n"
    for where, status, said in ((">/dev/full", 2, full), ("| true", 1, "")):  # of a closed pipe click says nothing
        command = f"set -o pipefail; {shlex.quote(sys.executable)} -c {shlex.quote(code)} {where}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (status, said)


def test_a_log_that_has_gone_away_stops_no_stage(clone, written, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", Gone())
        folder = pipeline.run_profile(clone, "demo")
    assert len(list(folder.glob("*/stamp.json"))) == 3


def test_a_kernel_that_does_not_start_and_a_folder_without_locks_are_one_line(clone, tmp_path, monkeypatch):
    def dies(*_):
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(pipeline, "_papermill", dies)
    with pytest.raises(pipeline.StageError, match=r"square_3 failed: its kernel did not start .*see .*/kernel.log"):
        pipeline.execute(load_profile(clone, "demo")["square_3"], {}, tmp_path, clone)

    def no_locks(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with pytest.raises(ConfigError, match=r"runs/demo/.lock: cannot be locked \(No locks available\); .*--runs"):
        pipeline.run_profile(clone, "demo")


@pytest.mark.parametrize(
    "text, value",
    [
        ("010", "010"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0o10", "0o10"),
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x10", 16),
        ("1.5", 1.5),
        ("1.5e-3", 1.5e-3),
        ("-.5", -0.5),
        ("-.inf", -np.inf),
        ("yes", True),
        ("null", None),
    ],
)
def test_yaml_reads_numbers_as_everybody_does(text, value):
    found = read_yaml(f"n: {text}", "this")["n"]
    assert found == value and type(found) is type(value)


def test_profiles_that_cannot_be_read_say_the_way_out(clone, monkeypatch):
    path = clone / "nbs/paper/profiles/demo.yaml"
    text = path.read_text()
    monkeypatch.chdir(clone)
    for old, new, said in (
        ("n: [3, 5]", "n: [010, 5]", "yaml reads this as text: write 10"),
        ("table_sum:", "no:", "a stage's name as False, which is no text: put it in quotes"),
        ("table_sum:", "1:", "a stage's name as 1, which is no text: put it in quotes"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_profile(clone, "demo")
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ConfigError, match="demo.yaml: not yaml: .*; save it as UTF-8"):
        load_profile(clone, "demo")
    (clone / "mine.yml").write_text(text, encoding="utf-8-sig")
    assert list(load_profile(clone, "mine.yml")) == ["square_3", "square_5", "table_sum"]
    assert profile_runs(clone, "mine.yml") == clone / "runs/mine"


def test_pictures_of_one_colour_are_no_data(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (8, 8), 200).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ConfigError, match="all pictures are of one and the same colour"):
        look_at(tmp_path)


@pytest.mark.parametrize("size, side", [([8, 8], 8), (8, 8), ([8, 16], 0), (None, 0), ("8", 0), (True, 0)])
def test_the_size_of_a_diffusers_network_is_one_number_or_refused(size, side):
    if side:
        assert _side(dict(sample_size=size), "here") == side
    else:
        with pytest.raises(FileError, match="here: unet: sample_size = "):
            _side(dict(sample_size=size), "here")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16", "diffusion_pytorch_model-00001-of-00002"])
def test_parts_and_variants_of_diffusers_weights_are_refused_with_the_way_out(name, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(dict(_class_name="UNet2DModel")), encoding="utf-8-sig")
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    (tmp_path / f"unet/{name}.safetensors").touch()
    with pytest.raises(FileError, match=rf"one whole file is needed, {name}.safetensors is a part or a variant"):
        load_diffusers(tmp_path)


def test_released_weights_are_read_whatever_wraps_them_and_ends_their_name(tmp_path):
    model = get_nb.create_model("GET-T/2", image_size=8, num_classes=3)
    state = model.state_dict()
    for i, wrapper in enumerate(("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")):
        path = tmp_path / f"{i}{('.pth', '.PTH', '.pt', '.ckpt', '.PT')[i]}"
        ema = {f"{wrapper}{k}": v for k, v in state.items()}
        torch.save(dict(ema=ema, best_fid=np.float64(2.5)), path, pickle_protocol=2)
        found = _load_kind(path, ("model",), "no model")
        assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


def test_a_pointer_of_git_lfs_is_named_for_what_it_is(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name, read in (
        ("a.safetensors", get_nb.load_checkpoint),
        ("a.pth", get_nb.load_reference_get),
        ("a.pkl", get_nb.load_edm_pickle),
        ("a.bin", import_file),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(FileError, match=f"{name}: .*git lfs pull"):
            read(tmp_path / name)


def test_what_macos_leaves_beside_files_is_no_data(tmp_path):
    for part in ("latent", "image"):
        (tmp_path / part).mkdir()
        torch.save(torch.zeros(2, 1, 8, 8), tmp_path / part / "3.pkl")
        (tmp_path / part / "._3.pkl").write_bytes(b"\0\5\26\7")
    assert get_nb.import_reference_pairs(tmp_path, tmp_path / "out")["recipe"]["n"] == 2
    x = torch.zeros(2, 1, 8, 8)
    save_pairs(tmp_path / "p", x, x, first_seed=0)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/.DS_Store").touch()
    assert merge_pairs([tmp_path / "p"], tmp_path / "merged")["recipe"]["n"] == 2


def test_endings_of_pictures_may_be_in_capitals(tmp_path):
    sample_to_file("digits-get", tmp_path / "x.PNG", 2)
    assert read_picture(tmp_path / "x.PNG").mode == "L"
    sample_to_file("digits-get", tmp_path / "x.NPZ", 2)
    with np.load(tmp_path / "x.NPZ") as f:
        assert f["images"].shape == (2, 1, 8, 8)
    CliRunner().invoke(
        cli, ["sample", "digits-get", "-n", "1", "--out", str(tmp_path / "y.PNG")], catch_exceptions=False
    )
    assert (tmp_path / "y.PNG").is_file()


def test_a_clock_that_is_set_back_gives_no_negative_seconds(clone, written, monkeypatch):
    times = iter(range(10**6, 0, -100))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    stage, runs = load_profile(clone, "demo")["square_3"], runs_folder(clone, "demo")
    assert pipeline.run_stage(stage, stage_key(stage, runs), clone, runs)["seconds"] >= 0
    model = torch.nn.Linear(2, 2)
    cfg = TrainConfig(steps=2, lr=1e-2, batch_size=2)
    assert train(model, lambda m, step, share: m(torch.ones(2, 2)).mean(), cfg)[1]["seconds"] >= 0
