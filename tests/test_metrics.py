"""Metrics as published: torch-fidelity's own numbers, checked files, hostile statistics, one result on any number of processes."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import ROOT
from PIL import Image
from torch import nn

from get_nb.lab.core import ConfigError, FileError, torch_rng
from get_nb.lab.images import to_uint8
from get_nb.lab.files import sha256_file
from get_nb.lab.perceptual import dists_weights, load_loss, load_vgg16, lpips_weights
from get_nb.losses import VGG_CHANNELS, get_loss, l2, make_dists, make_lpips
from get_nb.lab.metrics import InceptionFeatures, compare, load_features, load_statistics, nearest_training


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "Whatever would download fails the test, and no published weights are there."

    def fail(*args, **kw):
        raise AssertionError("tried to download")

    for where in (
        "torch.hub.load_state_dict_from_url",
        "torch.hub.download_url_to_file",
        "urllib.request.urlopen",
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
    ):
        monkeypatch.setattr(where, fail)
    monkeypatch.setenv("GET_NB_WEIGHTS", str(tmp_path / "none"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    "A file of Inception's layout with random weights, made by torch-fidelity's own class."
    module = torch_fidelity.feature_extractor_inceptionv3

    class Fresh(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    kept, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *args, **kw: None
    torch.manual_seed(0)
    try:
        path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
        torch.save(Fresh("fresh", ["2048"]).state_dict(), path)
    finally:
        module.load_state_dict_from_url = kept
    return path


def image_folder(folder, n, size, seed):
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch_rng(seed), dtype=torch.uint8)
    folder.mkdir()
    for i, x in enumerate(images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return images


def test_every_metric_is_torch_fidelity_s_own_on_the_same_folders_of_images(
    no_network, inception, tmp_path, monkeypatch
):
    # the shallow layers, so that it takes seconds: the next test goes to full depth
    layer = staticmethod(lambda metric: "192" if metric == "isc" else "64")
    monkeypatch.setattr(InceptionFeatures, "get_default_feature_layer_for_metric", layer)
    a, b = (image_folder(tmp_path / name, 10, 32, name) for name in "ab")
    network = load_features("inception", path=inception, sha256=sha256_file(inception))
    ours = compare(a, b, network)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        cuda=False,
        batch_size=100,
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subset_size=10,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception),
        feature_layer_isc="192",
        **{f"feature_layer_{m}": "64" for m in ("fid", "kid", "prc")},
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["fd"] == theirs["frechet_inception_distance"] > 0
    assert ours["kid"] == theirs["kernel_inception_distance_mean"]
    assert ours["kid_std"] is None  # every subset of so few is the whole
    assert (ours["precision"], ours["recall"], ours["inception_score"]) == (
        theirs["precision"],
        theirs["recall"],
        theirs["inception_score_mean"],
    )
    assert network.distance("cifar10") == "FID"


def test_features_at_full_depth_are_torch_fidelity_s_own(no_network, inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch_rng("depth"), dtype=torch.uint8)
    ours = load_features("inception", path=inception, sha256=sha256_file(inception))(images)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception))(images)
    assert torch.equal(ours["features"], theirs[0]) and torch.equal(ours["logits"], theirs[1])
    assert ours["features"].shape == (2, 2048) and ours["logits"].shape == (2, 1008)


def test_inception_is_used_only_with_the_published_bytes_and_never_fetched(no_network, inception):
    with pytest.raises(
        FileError, match="put https://github.com/toshas/torch-fidelity/.*there, or name its folder in .GET_NB_WEIGHTS"
    ):
        load_features("inception")
    with pytest.raises(FileError, match="the published one with 6726825d"):
        load_features("inception", path=inception)


def test_weights_that_would_run_code_are_refused(no_network, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/canary",)

    torch.save(Attack(), tmp_path / "w.pth")
    with pytest.raises(FileError, match="w.pth"):
        load_features("inception", path=tmp_path / "w.pth", sha256=sha256_file(tmp_path / "w.pth"))
    torch.save(dict(a=torch.ones(1)), tmp_path / "w.pth")
    with pytest.raises(FileError, match="w.pth: not Inception's weights"):
        load_features("inception", path=tmp_path / "w.pth", sha256=sha256_file(tmp_path / "w.pth"))
    assert not (tmp_path / "canary").exists()


def test_images_reach_the_metrics_as_the_released_bytes():
    from get_nb.evaluation import sample_seeds

    class Constant(nn.Module):
        config = dict(channels=3, image_size=32, num_classes=0)

        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.linspace(-1.4, 1.4, 3 * 32 * 32).view(1, 3, 32, 32))

        def forward(self, noise, labels=None):
            return self.x.expand(len(noise), -1, -1, -1)

    model = Constant()
    x = model.x.detach().numpy()
    released = np.clip(x * np.float32(127.5) + np.float32(128), 0, 255).astype(np.uint8)
    images = sample_seeds(model, range(2))[0].numpy()
    assert (images == released).all() and released.min() == 0 and released.max() == 255
    assert (to_uint8(np.asarray(x)) == released).all()


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def statistics_file(path, kind):
    mu, sigma = np.zeros(3), np.eye(3)
    if kind == "absent":
        return "no such file"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Canary(path.with_name("canary"))))
        return "not an npz file"
    if kind == "object":
        np.savez(path, mu=np.array([Canary(path.with_name("canary"))] * 3, dtype=object), sigma=sigma)
        return "not an npz file"
    if kind == "npy":
        with open(path, "wb") as f:
            np.save(f, sigma)
        return "not an npz file"
    if kind == "truncated":
        np.savez(path, mu=mu, sigma=sigma)
        path.write_bytes(path.read_bytes()[:-30])
        return "not an npz file"
    if kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open("mu.npy", "w") as f:
            for _ in range(520):
                f.write(bytes(2**20))
        return "unpack to 545,259,520 bytes"
    if kind in ("huge", "overflow", "negative size"):
        shape = dict(huge=(10**13,), overflow=(2**62, 2**62))[kind] if kind != "negative size" else (-1,)
        head = repr(dict(descr="<f8", fortran_order=False, shape=shape)).ljust(117).encode() + b"\n"
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
        return "not an npz file"
    bad = dict(
        nameless=(dict(mu=mu), "not an npz file"),
        shapes=(dict(mu=np.zeros(4), sigma=sigma), "should be"),
        scalar=(dict(mu=np.zeros(()), sigma=np.zeros(())), "should be"),
        nan=(dict(mu=mu, sigma=sigma * np.nan), "NaN"),
        asymmetric=(dict(mu=mu, sigma=np.triu(np.ones((3, 3)))), "not symmetric"),
        negative=(dict(mu=mu, sigma=-sigma), "negative variance"),
        text=(dict(mu=np.array(["a"] * 3), sigma=sigma), "not real numbers"),
    )
    np.savez(path, **bad[kind][0])
    return bad[kind][1]


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "pickle",
        "object",
        "npy",
        "truncated",
        "nameless",
        "shapes",
        "scalar",
        "nan",
        "asymmetric",
        "negative",
        "text",
        "bomb",
        "huge",
        "overflow",
        "negative size",
    ],
)
def test_statistics_that_are_no_gaussian_are_refused_in_one_line_and_run_nothing(tmp_path, kind):
    path = tmp_path / "s.npz"
    reason = statistics_file(path, kind)
    with pytest.raises(FileError) as e:
        load_statistics(path)
    assert str(path) in str(e.value) and reason in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "canary").exists()


def test_precision_and_recall_hold_a_few_rows_of_distances_and_say_what_all_at_once_do(monkeypatch):
    from get_nb.lab import metrics
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = (
        dict(features=torch.randn(n, 8, generator=torch_rng(n)), logits=torch.randn(n, 3, generator=torch_rng(n)))
        for n in (300, 200)
    )

    class Network:
        device = "cpu"

        def reference(self, images):
            return dict(features=b["features"], statistics=metrics.fid_features_to_statistics(b["features"]))

    seen, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda x, y: seen.append(len(x) * len(y)) or cdist(x, y))
    whole = prc_features_to_metric(a["features"], b["features"], save_cpu_ram=False, verbose=False)
    assert max(seen) == 300 * 300
    seen.clear()
    monkeypatch.setattr(metrics, "DISTANCES", 6000)
    out = compare(a, torch.zeros(200, 1, 1, 1, dtype=torch.uint8), Network())
    assert max(seen) <= 6000 and (out["precision"], out["recall"]) == (whole["precision"], whole["recall"])


def test_nearest_training_images_are_the_same_in_pieces():
    g = torch_rng("pieces")
    a, b = (torch.randint(0, 256, (n, 1, 4, 4), generator=g, dtype=torch.uint8) for n in (50, 4300))
    i, d, own = nearest_training(a, b)
    x, y = (t.double().flatten(1) / 127.5 - 1 for t in (a, b))
    whole = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    between = torch.cdist(y[i], y, compute_mode="donot_use_mm_for_euclid_dist")
    between[torch.arange(len(i)), i] = torch.inf
    assert torch.equal(i, whole.argmin(1)) and torch.allclose(d.double(), whole.min(1).values, atol=1e-4)
    assert torch.allclose(own.double(), between.min(1).values, atol=1e-4)


@pytest.fixture(scope="module")
def vgg_state():
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {f"features.{k}": v.shape for k, v in vgg16(weights=None).features.state_dict().items()}
    return {
        k: torch.randn(s, generator=torch_rng(k)) * (2 / s[1:].numel()) ** 0.5 if len(s) == 4 else torch.full(s, 0.01)
        for k, s in shapes.items()
    }


def test_lpips_and_dists_are_piq_s_own_on_the_same_weights(monkeypatch, vgg_state):
    import piq

    alpha, beta = (torch.rand(1, 3 + sum(VGG_CHANNELS), 1, 1, generator=torch_rng(i)) for i in "ab")
    total = alpha.sum() + beta.sum()
    weights = dict(alpha=alpha / total, beta=beta / total)
    monkeypatch.setattr("piq.perceptual.vgg16", lambda **kw: type("Net", (), dict(features=load_vgg16(vgg_state))))
    monkeypatch.setattr(
        "torch.hub.load_state_dict_from_url", lambda url, **kw: weights if "dists" in url else lpips_weights()
    )
    a, b = (torch.rand(1, 3, 224, 224, generator=torch_rng(i)) * 2 - 1 for i in "xy")
    for ours, theirs in (
        (make_lpips(load_vgg16(vgg_state), lpips_weights()), piq.LPIPS()),
        (make_dists(load_vgg16(vgg_state), dists_weights(weights)), piq.DISTS()),
    ):
        with torch.no_grad():
            assert abs(ours(a, b).item() - theirs((a + 1) / 2, (b + 1) / 2).item()) < 1e-6


def test_perceptual_losses_say_what_they_need(no_network, monkeypatch):
    load_loss.cache_clear()
    for name, file in (("lpips", "vgg16-397923af.pth"), ("dists", "dists_weights.pt")):
        with pytest.raises(FileError, match=file):
            load_loss(name)
    for state in (
        {},
        dict(alpha=torch.ones(1, 3, 1, 1), beta=torch.ones(1)),
        {k: torch.ones(1, 1475, 1, 1) for k in ("alpha", "beta")},
    ):
        with pytest.raises(FileError, match="dists_weights.pt"):
            dists_weights(state)
    monkeypatch.setitem(sys.modules, "piq", None)
    with pytest.raises(ConfigError, match=r"get_nb\[perceptual\]"):
        load_loss("lpips")


def test_a_loss_that_needs_files_names_the_function_that_reads_them():
    for name in ("lpips", "dists"):
        with pytest.raises(ConfigError, match=rf"get_nb.lab.perceptual.load_loss\('{name}'\)"):
            get_loss(name)
    assert load_loss("l2") is get_loss("l2") is l2
    with pytest.raises(ConfigError, match="did you mean 'lpips'"):
        load_loss("lpip")


def test_distillation_minimises_the_distance_that_is_handed_in(vgg_state):
    from get_nb.distillation import DistillConfig, distill_loss
    from get_nb.evaluation import training_cost

    lpips = make_lpips(load_vgg16(vgg_state), lpips_weights())

    class Half(nn.Module):
        config = dict(channels=1, image_size=8, num_classes=0)

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def unrolled(self, noise, labels=None, z0=None, n_iter=1):
            return [self.scale * noise]

    model, noise, cfg = Half(), torch.randn(1, 1, 8, 8, generator=torch_rng("handed in")), DistillConfig(loss="lpips")
    with pytest.raises(ConfigError, match="load_loss"):
        distill_loss(model, noise, None, noise, cfg)
    loss = distill_loss(model, noise, None, noise, cfg, distance=lpips)
    assert loss == lpips(0.5 * noise, noise) > 0
    counted = [training_cost(model, c, 1, d)["train_gflop"] for c, d in ((cfg, lpips), (DistillConfig(), None))]
    assert counted[0] > 90 > counted[1]  # three passes of VGG16 forward and one backward, at 31 GFLOP each


def test_two_processes_measure_what_one_does(tmp_path):
    from get_nb.lab.core import seed_everything
    from get_nb.lab.files import save_checkpoint
    from get_nb.lab.classifier import create_classifier
    from get_nb.lab.checkpoints import create_model

    seed_everything(0)
    kw = dict(num_classes=10, image_size=8, channels=1)
    save_checkpoint(tmp_path / "get.safetensors", create_model("GET-digits/2", **kw))
    save_checkpoint(tmp_path / "c.safetensors", create_classifier(**kw))
    (tmp_path / "get_nb_command.py").write_text("from get_nb.lab.cli import main\nmain()\n", encoding="utf-8")
    command = [
        tmp_path / "get_nb_command.py",
        "evaluate",
        tmp_path / "get.safetensors",
        "--classifier",
        tmp_path / "c.safetensors",
        "--samples",
        "230",
        "--batch",
        "50",
        "--device",
        "cpu",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = dict(os.environ, OMP_NUM_THREADS="1", GET_NB_PROGRESS="off", PYTHONPATH=str(ROOT))
    for n, start in ((1, [sys.executable]), (2, torchrun)):
        done = subprocess.run(
            [*start, *command, "--json", tmp_path / f"{n}.json"], cwd=ROOT, capture_output=True, text=True, env=env
        )
        assert done.returncode == 0 and not done.stdout, done.stderr
        assert (
            done.stderr.count("FD-digits ↓") == 1 and "digits/train" in done.stderr
        )  # one table: the second process prints none
    one, two = (json.loads((tmp_path / f"{n}.json").read_text(encoding="utf-8")) for n in (1, 2))
    for r in (one, two):
        r.pop("ms_per_image")
    assert one == two and one["samples"] == 230 and one["distance"] == "FD-digits" and one["n_iter"] == 6
