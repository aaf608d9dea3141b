"""What the authors released, read into our formats: exact, resumable, in bounded memory; whatever does not fit is one clear line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import released
from get_nb.lab import imports
from get_nb.lab.imports import import_file, import_reference_pairs
from get_nb.lab.released import find_preset, load_edm_pickle, load_reference_get
from get_nb.lab.cli import main
from get_nb.lab.core import ConfigError, seed_everything
from get_nb.lab.data import load_data
from get_nb.lab.checkpoints import load_checkpoint
from get_nb.lab.core import FileError
from get_nb.lab.cifar import load_cifar10
from get_nb.lab.folders import load_folder
from get_nb.lab.checkpoints import create_model
from get_nb.lab.generation import merge_pairs
from get_nb.lab.store import PairDataset
from get_nb.sampler import edm_sigmas, heun_sample
from get_nb.lab.checkpoints import create_teacher
from get_nb.lab.diffusers import load_diffusers
from test_parity import STATE, shapes_in


@pytest.mark.parametrize(
    "classes, dtype, zipped",
    [(10, torch.float32, True), (0, torch.float64, False)],
    ids=["conditional", "unconditional"],
)
def test_twenty_thousand_released_pairs_round_trip_exactly(classes, dtype, zipped, tmp_path):
    names = [str(2500 * (i + 1) - 1) for i in (5, 0, 3, 7, 1, 2, 6, 4)]  # as text, 17499 comes before 2499
    noise, image, label = (
        torch.empty(20_000, 3, 8, 8),
        torch.empty(20_000, 3, 8, 8, dtype=dtype),
        torch.empty(20_000, dtype=torch.int64),
    )
    for name in names:
        at = slice(int(name) - 2499, int(name) + 1)
        noise[at], label[at], image[at] = released.write_pairs(
            tmp_path / "src", [name], 2500, classes, dtype=dtype, zipped=zipped, seed=int(name)
        )
    manifest = import_reference_pairs(tmp_path / "src", tmp_path / "out")
    data = PairDataset(tmp_path / "out")
    b = data.batch(np.arange(20_000))
    assert (
        len(data) == 20_000
        and data.num_classes == classes
        and data.shape == (3, 8, 8)
        and len(manifest["shards"]) == 16
    )
    assert b["image"].dtype == dtype and all(
        torch.equal(b[k], v) for k, v in (("noise", noise), ("image", image), ("label", label))
    )


MEASURE = """
import sys
from get_nb.lab.imports import import_reference_pairs
def high(): return int(next(x.split()[1] for x in open("/proc/self/status") if x.startswith("VmHWM"))) / 1024
before = high(); import_reference_pairs(sys.argv[1], sys.argv[2], shard_size=100); print(before, high())
"""


def test_memory_holds_a_shard_not_a_file(tmp_path):
    released.write_pairs(tmp_path / "src", ["1999"], 2000, 0, (3, 32, 32))  # 74 MB, of which a shard is 3.7 MB
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "src", tmp_path / "out"], capture_output=True, text=True
    )
    before, after = map(float, done.stdout.split())
    print(f"peak memory {before:.0f} MB before, {after:.0f} MB after")
    assert after - before < 40 and after < 1000


def test_an_interrupted_import_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    released.write_pairs(tmp_path / "src", ["9", "19"], 10, 10)
    whole, calls = import_reference_pairs(tmp_path / "src", tmp_path / "whole", 4), []
    save = imports.save_tensors
    monkeypatch.setattr(
        imports,
        "save_tensors",
        lambda path, *a: (
            calls.append(path) or (save(path, *a) if len(calls) < 4 else (_ for _ in ()).throw(KeyboardInterrupt))
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        import_reference_pairs(tmp_path / "src", tmp_path / "out", 4)
    monkeypatch.setattr(imports, "save_tensors", save)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert len(times) == 3 and not any("manifest" in n or n.startswith(".") for n in times)
    assert import_reference_pairs(tmp_path / "src", tmp_path / "out", 4) == whole
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in times.items())
    released.write_pairs(tmp_path / "src", ["9", "19"], 10, 10, seed=1)
    with pytest.raises(FileError, match="use an empty folder"):
        import_reference_pairs(tmp_path / "src", tmp_path / "out", 4)


def save(path, value):
    torch.save(value, path)


N, X = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
HOT = torch.eye(10)[:4]
BROKEN_PAIRS = {
    "NaN in an image": lambda d: save(d / "image/9.pkl", X * torch.nan),
    "infinite noise": lambda d: save(d / "latent/9.pkl", [N / 0, HOT]),
    "two classes at once": lambda d: save(d / "latent/9.pkl", [N, HOT + HOT.flip(1)]),
    "no class": lambda d: save(d / "latent/9.pkl", [N, HOT * 0]),
    "half a class": lambda d: save(d / "latent/9.pkl", [N, HOT / 2]),
    "labels for fewer": lambda d: save(d / "latent/9.pkl", [N, HOT[:3]]),
    "fewer images": lambda d: save(d / "image/9.pkl", X[:3]),
    "another size": lambda d: save(d / "image/9.pkl", X[..., :4]),
    "no images": lambda d: save(d / "image/9.pkl", "text"),
    "whole numbers": lambda d: save(d / "image/9.pkl", X.long()),
    "unconditional among conditional": lambda d: save(d / "latent/9.pkl", N),
    "a lost partner": lambda d: (d / "image/9.pkl").unlink(),
    "one number twice": lambda d: [save(d / f"{k}/x9.pkl", N) for k in ("latent", "image")],
    "no number": lambda d: (d / "image/9.pkl").rename(d / "image/nine.pkl"),
    "cut": lambda d: (d / "image/9.pkl").write_bytes((d / "image/9.pkl").read_bytes()[:3000]),
    "empty": lambda d: (d / "image/9.pkl").write_bytes(b""),
}


@pytest.mark.parametrize("name", BROKEN_PAIRS)
def test_pairs_that_do_not_fit_are_one_line_that_names_the_file(name, tmp_path):
    released.write_pairs(tmp_path / "src", ["3", "9"], 4, 10, dtype=torch.float32)
    BROKEN_PAIRS[name](tmp_path / "src")
    with pytest.raises(FileError, match=r"9\.pkl|nine\.pkl|/3\.pkl") as e:
        import_reference_pairs(tmp_path / "src", tmp_path / "out")
    assert len(str(e.value).splitlines()) == 1 and not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("name", STATE)
def test_every_released_size_is_recognised_by_its_shapes(name):
    model, conditional = name.split("|")
    found = find_preset({k: torch.empty(v, device="meta") for k, v in shapes_in(STATE[name]).items()}, name)
    assert (found["name"], found["num_classes"]) == (model, 10 if conditional == "cond" else 0)


@pytest.mark.parametrize("name, zipped", [("GET-T/2", True), ("ViT-S/4", False)])
def test_a_released_pth_gives_the_averaged_weights_and_the_class_conditional_vit_runs(name, zipped, tmp_path):
    seed_everything(0, name)
    made = create_model(name, num_classes=10)
    back = load_reference_get(released.write_get(tmp_path / "x.pth", made, zipped))
    assert (
        all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), back.state_dict().values()))
        and not back.training
    )
    if name.startswith("ViT"):
        with torch.no_grad():
            assert back(torch.randn(1, 3, 32, 32), torch.tensor([3])).shape == (1, 3, 32, 32)


def command(capsys, *args):
    "`get-nb import`, in this process; -> exit code, what it said, its lines on stderr."
    with pytest.raises(SystemExit) as e:
        main(["import", *map(str, args)])
    said = capsys.readouterr()
    return e.value.code, said.out, said.err.splitlines()


@pytest.mark.parametrize(
    "precond, network, word",
    [
        ("VPPrecond", "SongUNet", "VPPrecond"),
        ("VEPrecond", "SongUNet", "VEPrecond"),
        ("iDDPMPrecond", "DhariwalUNet", "iDDPMPrecond"),
        ("EDMPrecond", "DhariwalUNet", "DhariwalUNet"),
    ],
)
def test_an_edm_network_is_loaded_and_its_relatives_are_refused_in_one_line(precond, network, word, tmp_path, capsys):
    seed_everything(0)
    teacher = create_teacher("edm-cifar10-32x32-cond-vp", base=8, mult=(1,), blocks=1, attention=(), num_classes=10)
    back = load_edm_pickle(released.write_edm(tmp_path / "good.pkl", teacher))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in teacher.state_dict().items())
    code, _, lines = command(
        capsys,
        released.write_edm(tmp_path / "other.pkl", teacher, precond, network),
        "--out",
        tmp_path / "o.safetensors",
    )
    assert code == 2 and len(lines) == 1 and word in lines[0] and "supported" in lines[0]
    assert not list(tmp_path.glob("*o.safe*"))


@pytest.mark.parametrize("kind", ["cond", "uncond"])
@pytest.mark.parametrize("variant", ["vp", "ve"])
def test_an_edm_file_that_names_only_what_differs_from_the_defaults_is_imported_under_its_own_name(
    kind, variant, tmp_path, capsys
):
    seed_everything(0)
    name = f"edm-cifar10-32x32-{kind}-{variant}"
    teacher = create_teacher(name, base=8, mult=(1, 1, 1))
    unsaid = ("num_blocks", "attn_resolutions", "decoder_type")  # EDM's train.py never passes the first two
    path = released.write_edm(tmp_path / "x.pkl", teacher, lacks=unsaid)
    back = load_edm_pickle(path)
    assert back.config["name"] == name and back.sigma_data == 0.5
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in teacher.state_dict().items())
    code, said, _ = command(capsys, path, "--out", tmp_path / "t.safetensors")
    assert code == 0 and f"{name}, images 3x32x32, {'10' if kind == 'cond' else 'no'} classes" in said
    assert load_edm_pickle(released.write_edm(tmp_path / "y.pkl", teacher, sigma_data=0.7)).sigma_data == 0.7


def test_pairs_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    released.write_pairs(tmp_path / "src", ["9"], 10, 10)
    shard = imports._pairs_shard

    def meanwhile(*args):
        os.utime(tmp_path / "src/latent/9.pkl", ns=(1, 1))
        return shard(*args)

    monkeypatch.setattr(imports, "_pairs_shard", meanwhile)
    with pytest.raises(FileError, match=r"9\.pkl.* changed while it was read"):
        import_reference_pairs(tmp_path / "src", tmp_path / "out", 4)
    assert not (tmp_path / "out/manifest.json").exists()


def test_imported_pairs_are_not_merged(tmp_path):
    released.write_pairs(tmp_path / "src", ["9"], 10, 10)
    import_reference_pairs(tmp_path / "src", tmp_path / "out")
    with pytest.raises(FileError, match="imported pairs have no seeds"):
        merge_pairs([tmp_path / "out"], tmp_path / "merged")


def test_the_command_imports_each_kind_and_leaves_nothing_behind_when_it_cannot(tmp_path, capsys):
    made = create_model("GET-digits/2", num_classes=10, image_size=8, channels=1)
    released.write_get(tmp_path / "get.pth", made)
    released.write_pairs(tmp_path / "released", ["9"], 10, 10)
    for source, out in (("get.pth", "get.safetensors"), ("released", "pairs")):
        code, said, _ = command(capsys, tmp_path / source, "--out", tmp_path / out)
        assert code == 0 and out in said
    assert (
        load_checkpoint(tmp_path / "get.safetensors").meta["imported"] == "get.pth"
        and len(PairDataset(tmp_path / "pairs")) == 10
    )
    (tmp_path / "text.pkl").write_text("hello", encoding="utf-8")
    (tmp_path / "bad.pth").write_bytes((tmp_path / "get.pth").read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    for args, word in (
        (["text.pkl"], "neither a released GET"),
        (["bad.pth"], "bad.pth"),
        (["none.pkl"], "no such file"),
        (["get.safetensors"], "already"),
        (["get.pth", "--out", tmp_path / "get.safetensors"], "is there already"),
        (["get.pth", "--out", tmp_path / "x.pth"], ".safetensors"),
        (["text.pkl", "--download"], "only cifar10"),
    ):
        code, _, lines = command(capsys, tmp_path / args[0], *args[1:])
        assert code == 2 and len(lines) == 1 and word in lines[0], (args, lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_diffusers_pipeline_is_a_denoiser_by_the_epsilon_formula(tmp_path):
    import diffusers

    seed_everything(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    schedule = diffusers.DDPMScheduler(num_train_timesteps=1000)
    diffusers.DDPMPipeline(unet=net, scheduler=schedule).save_pretrained(tmp_path / "pipe")
    print(import_file(tmp_path / "pipe", tmp_path / "t.safetensors"))
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    for teacher in (load_diffusers(tmp_path / "pipe"), load_checkpoint(tmp_path / "t.safetensors")):
        for t in (0, 17, 500, 999):
            a = schedule.alphas_cumprod[t]
            sigma = ((1 - a) / a).sqrt()
            with torch.no_grad():
                expected = x - sigma * net(x * a.sqrt(), t, y).sample
                assert (teacher(x, sigma, y) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
        assert heun_sample(teacher, x, y, num_steps=2).shape == x.shape
        with pytest.raises(ConfigError, match="pass labels"):
            teacher(x, 1.0)
    (tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "pipe/unet/diffusion_pytorch_model.bin"
    )
    with pytest.raises(FileError, match="pickles"):
        load_diffusers(tmp_path / "pipe")
    config = json.loads((tmp_path / "pipe/unet/config.json").read_text(encoding="utf-8"))
    (tmp_path / "pipe/unet/config.json").write_text(
        json.dumps(config | dict(_class_name="UNet2DConditionModel")), encoding="utf-8"
    )
    with pytest.raises(FileError, match="UNet2DConditionModel"):
        load_diffusers(tmp_path / "pipe")


def test_cifar10_is_read_exactly_and_only_with_its_published_checksums(tmp_path, monkeypatch):
    images, labels = released.write_cifar(tmp_path, 20)
    train = load_cifar10("train", tmp_path, verify=False)
    assert (
        np.array_equal(train.images.numpy(), images)
        and train.labels.tolist() == labels
        and train.name == "CIFAR-10 (unverified)/train"
    )
    with pytest.raises(FileError, match="md5 is not the published one"):
        load_cifar10("train", tmp_path)
    monkeypatch.setenv("GET_NB_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"elsewhere/cifar-10-batches-py/test_batch is missing; unpack .* --download"):
        load_data("cifar10", "test")


def test_a_folder_of_images_is_split_by_class_and_wrong_sizes_are_named(tmp_path):
    for c in ("cat", "dog"):
        (tmp_path / c).mkdir()
        for i in range(10):
            Image.fromarray(np.full((8, 8, 3), 10 * i + (c == "dog"), np.uint8)).save(tmp_path / c / f"{i}.png")
    train, test = load_data(f"folder:{tmp_path}"), load_data(f"folder:{tmp_path}", "test")
    assert (
        torch.bincount(train.labels).tolist() == [8, 8]
        and torch.bincount(test.labels).tolist() == [2, 2]
        and train.classes == ("cat", "dog")
    )
    assert sorted(torch.cat([train.images, test.images])[:, 0, 0, 0].tolist()) == sorted(
        10 * i + d for i in range(10) for d in (0, 1)
    )
    (tmp_path / "cat/broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(FileError, match="broken.png: not an image"):
        load_folder(tmp_path, "all")
    (tmp_path / "cat/broken.png").unlink()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "dog/odd.png")
    with pytest.raises(ConfigError, match=r"odd.png: 8x9 pixels; .*@8"):
        load_folder(tmp_path, "all")
    assert load_folder(tmp_path, "all", size=4).shape == (3, 4, 4)


def test_churn_shows_the_raised_noise_level_to_denoiser_and_slope():
    seen = []

    def denoiser(x, sigma, labels):
        seen.append((float(sigma), x.double()))
        return torch.zeros_like(x)

    noise, N = torch.randn(2, 1, 4, 4), 4
    out = heun_sample(denoiser, noise, num_steps=N, S_churn=1.0, S_min=0.01, S_max=50.0, seed=3)
    sigmas, gamma = edm_sigmas(N).tolist(), 0.25
    raised = [s * (1 + gamma) if 0.01 <= s <= 50 else s for s in sigmas[:N]]
    assert [s for s, _ in seen] == pytest.approx(
        [raised[0], sigmas[1], raised[1], sigmas[2], raised[2], sigmas[3], raised[3]], rel=1e-6
    )
    x, t = seen[-1][1], raised[3]  # D = 0: the slope is x / t, and the last step ends at 0
    assert torch.allclose(out, x + (0 - t) * x / t, atol=1e-6)
    assert torch.equal(out, heun_sample(denoiser, noise, num_steps=N, S_churn=1.0, S_min=0.01, S_max=50.0, seed=3))
    with pytest.raises(ConfigError, match="churn"):
        heun_sample(denoiser, noise, S_churn=-1.0)
