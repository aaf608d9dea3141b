"""What a reading of the lab found: each case gave a wrong number, another library's exception, or a silent acceptance."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from get_nb.lab import capture, publishing
from get_nb.lab.classifier import create_classifier
from get_nb.lab.core import ConfigError, FileError, torch_rng
from get_nb.lab.costs import feature_flop, sampling_flop, stage_cost
from get_nb.lab.evaluate import evaluate_checkpoint, sample_to_file
from get_nb.lab.files import save_checkpoint
from get_nb.lab.generation import generate_pairs, merge_pairs
from get_nb.lab.metrics import compare, copy_share, load_features, load_statistics, nearest_training, save_statistics
from get_nb.lab.measured import Measured
from get_nb.lab.price import price_table, read_speeds
from get_nb.lab.profiles import Stage, load_profile
from get_nb.lab.records import read_record, save_record
from get_nb.lab.schedule import TrainConfig
from get_nb.lab.stages import stage_key
from get_nb.lab.state import Diverged, TrainingError
from get_nb.lab.store import save_pairs
from get_nb.lab.train import train
from get_nb.pairs import PairsConfig
from get_nb.progressive import snr_weight
from get_nb.teachers import build_teacher


def some_bytes(n, seed, shape=(1, 8, 8)):
    return torch.randint(0, 256, (n, *shape), generator=torch_rng("reading", seed), dtype=torch.uint8)


# What lies on disk decides a result


def stage_of(notebook, **params):
    return Stage("s", ROOT / f"nbs/paper/{notebook}.ipynb", params=params)


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(some_bytes(1, seed)[0, 0].numpy()).save(path)


def test_other_pictures_in_the_same_folder_are_another_key(tmp_path):
    for i in range(4):
        picture(tmp_path / f"pics/{'ab'[i % 2]}/{i}.png", i)
    stage = stage_of("classifier", data=f"folder:{tmp_path}/pics@8")
    first = stage_key(stage, tmp_path)
    assert stage_key(stage, tmp_path) == first
    (tmp_path / "pics/.DS_Store").write_bytes(b"no data")
    assert stage_key(stage, tmp_path) == first
    picture(tmp_path / "pics/a/0.png", 9)  # another picture under the same name
    second = stage_key(stage, tmp_path)
    picture(tmp_path / "pics/a/9.png", 0)  # one more
    assert len({json.dumps(k["inputs"]) for k in (first, second, stage_key(stage, tmp_path))}) == 3


def test_another_file_under_the_same_name_is_another_key(tmp_path):
    path = tmp_path / "teacher.pkl"
    keys = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        keys.append(stage_key(stage_of("import_teacher", file=str(path)), tmp_path)["inputs"])
    assert keys[0] != keys[1] and keys[0]


def test_shipped_weights_are_part_of_the_key_and_built_in_data_are_not():
    assert "content of file" in stage_key(stage_of("import_teacher", file="digits-teacher"), ROOT)["inputs"]
    assert not stage_key(stage_of("teacher", data="digits"), ROOT)["inputs"]


# Nearest training images


def test_a_training_picture_that_is_there_twice_is_no_neighbour_of_itself():
    train = some_bytes(50, 0)
    twice = torch.cat([train, train])
    once, doubled = nearest_training(train[:9], train), nearest_training(train[:9], twice)
    for a, b in zip(once, doubled):
        assert torch.equal(a, b)
    assert doubled[2].min() > 0 and copy_share(train, twice) == copy_share(train, train) == 1
    with pytest.raises(ConfigError, match="at least two that differ"):
        nearest_training(train[:2], train[:1].repeat(5, 1, 1, 1))


# Networks and their statistics


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    "Two classifiers of the same shape and other weights."
    folder, paths = tmp_path_factory.mktemp("classifiers"), []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(folder / f"{seed}.safetensors")
        save_checkpoint(paths[-1], create_classifier(num_classes=10, image_size=8, channels=1, width=8))
    return paths


def test_statistics_of_another_classifier_of_the_same_shape_are_refused(classifiers, tmp_path):
    one, other = (load_features(p) for p in classifiers)
    save_statistics(tmp_path / "s.npz", one.reference(some_bytes(40, 1))["statistics"], one, data="digits")
    statistics = load_statistics(tmp_path / "s.npz")
    assert compare(some_bytes(40, 2), statistics, one, only_fd=True)["fd"] > 0
    with pytest.raises(ConfigError, match="the statistics are of"):
        compare(some_bytes(40, 2), statistics, other, only_fd=True)


def test_kid_of_few_images_has_no_deviation_over_subsets_that_are_the_whole(classifiers):
    found = compare(some_bytes(60, 3), some_bytes(60, 4), load_features(classifiers[0]))
    assert found["kid_std"] is None and math.isfinite(found["kid"])


def test_inception_and_efficientnet_are_not_measured_with_one_number_of_references():
    with pytest.raises(ConfigError, match="ask for one of them at a time"):
        evaluate_checkpoint("digits-get", ["inception", "effnet"])


# Training


def descend(loss, tmp_path, **how):
    cfg = TrainConfig(steps=30, batch_size=4, lr=1e-2, log_every=2, checkpoint_every=5, **how)
    torch.manual_seed(0)
    return train(torch.nn.Linear(1, 1), loss, cfg, tmp_path / "state")


def test_a_loss_below_zero_may_fall(tmp_path):
    _, history = descend(lambda m, step, share: -(m.weight.abs().sum() + 1), tmp_path)
    assert history["loss"][-1] < history["loss"][0] < 0


def test_a_loss_that_is_not_finite_diverged_and_a_disk_that_fails_did_not(tmp_path, monkeypatch):
    with pytest.raises(Diverged):
        descend(lambda m, step, share: m.weight.sum() * (math.nan if step == 7 else 1), tmp_path / "a")

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("get_nb.lab.state.save_tensors", full)
    with pytest.raises(TrainingError) as e:
        descend(lambda m, step, share: m.weight.square().sum(), tmp_path / "b")
    assert not isinstance(e.value, Diverged)


@pytest.mark.parametrize(
    "first, second", [(dict(flip=True), {}), ({}, dict(flip=True)), (dict(flip=True), dict(flip=False))]
)
def test_a_checkpoint_whose_identity_says_more_or_other_things_is_refused(first, second, tmp_path):
    def run(identity):
        cfg = TrainConfig(steps=4, batch_size=4, lr=1e-2, checkpoint_every=2)
        torch.manual_seed(0)
        return train(torch.nn.Linear(1, 1), lambda m, step, share: m.weight.square().sum(), cfg, tmp_path, identity)

    run(dict(data="digits") | first)
    run(dict(data="digits") | first)  # the same run is taken
    with pytest.raises(FileError, match="made with flip = "):
        run(dict(data="digits") | second)


def test_recording_a_graph_draws_no_number_of_the_step(monkeypatch):
    "The generator stands where it stood, however often the work was run to warm up."

    class Nothing:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_stream(self, other):
            pass

        def replay(self):
            pass

    cuda = dict(Stream=Nothing, CUDAGraph=Nothing, graph=Nothing, stream=Nothing, current_stream=lambda *a: Nothing())
    for name, value in (cuda | dict(current_device=lambda: 0)).items():
        monkeypatch.setattr(torch.cuda, name, value)
    real = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: real([]))  # the CPU's generator stands for the GPU's
    torch.manual_seed(3)
    recorded = capture._recorded(lambda: torch.rand(4))[0]
    torch.manual_seed(3)
    assert torch.equal(recorded, torch.rand(4))


# Pairs


class Fast(torch.nn.Module):
    "A denoiser of nothing."

    def forward(self, x, sigma, labels=None):
        return x * 0


def test_a_shard_that_another_recipe_has_written_meanwhile_is_refused(tmp_path, monkeypatch):
    recipe = dict(teacher="none", n=4, num_classes=0, shape=(1, 4, 4), shard_size=2)
    generate_pairs(Fast(), tmp_path / "other", PairsConfig(**recipe, num_steps=5))
    import get_nb.lab.generation as generation

    real = generation._generate_missing

    def others(denoiser, folder, cfg, bar):
        real(denoiser, folder, cfg, bar)
        (folder / "pairs-00001.safetensors").write_bytes((tmp_path / "other/pairs-00001.safetensors").read_bytes())

    monkeypatch.setattr(generation, "_generate_missing", others)
    with pytest.raises(FileError, match="made with num_steps = 5, now 2"):
        generate_pairs(Fast(), tmp_path / "ours", PairsConfig(**recipe, num_steps=2))
    assert not (tmp_path / "ours/manifest.json").exists()


def test_pairs_of_text_and_a_merge_of_nothing_are_refused_in_one_line(tmp_path):
    text = np.array([[[["a"]]]])
    with pytest.raises(FileError, match="noise must hold numbers"):
        save_pairs(tmp_path / "text", text, text)
    with pytest.raises(ConfigError, match="no folders to merge"):
        merge_pairs([], tmp_path / "merged")


# Records and publishing


def test_a_record_without_arrays_has_none_of_the_one_before_it(tmp_path):
    save_record(tmp_path / "s", dict(a=1), images=np.zeros(3))
    save_record(tmp_path / "s", dict(a=2))
    assert not (tmp_path / "s/record.npz").exists() and read_record(tmp_path, "s")["a"] == 2


def test_rows_of_one_name_are_compared_each_with_its_own():
    columns = [dict(key="along", label="along", timing=False), dict(key="slope", label="slope", timing=False)]
    table = dict(
        columns=columns, notes=[], title="", rows=[dict(along="compute", slope=dict(value=v)) for v in (1.0, 2.0)]
    )
    other = json.loads(json.dumps(table))
    other["rows"][0]["slope"]["value"] = -99.0
    assert "1, compute / slope: -99 now, 1 published" in publishing.compare_table(other, table)


# Prices


def test_every_published_profile_can_be_priced_stage_by_stage_the_implicit_gradient_too():
    stages = load_profile(ROOT, "cpu-full")
    assert stage_cost(stages["ablate_implicit_0"], stages, "digits")["pflop"] > 0


def test_the_price_of_an_evaluation_counts_the_sweep_of_a_get():
    stages = load_profile(ROOT, "cpu")
    stage = stages["evaluate_get"]
    each = [sampling_flop("GET-digits/2", (), "digits", n) for n in (0, *stage.params["sweep"])]
    assert len(stage.params["sweep"]) > 1 and each[1] != each[2]
    cost = stage_cost(stage, stages, "digits")
    seen = len(each) * feature_flop("classifier", "digits")
    assert cost["pflop"] == pytest.approx(stage.params["samples"] * (sum(each) + seen) / 1e15)
    assert cost["evaluations"] == stage.params["samples"] * len(each)


def test_a_stage_is_priced_at_its_own_threads():
    stages = {n: s for n, s in load_profile(ROOT, "cpu-full").items() if n == "teacher"}
    one, two = (Measured("p", "s", "teacher", {}, seconds, "train unet", 1e12, 1e6) for seconds in (1000, 250))
    rates = {"P, 1 threads": [one], "P, 2 threads": [two], "H": [two]}
    table = price_table(stages, rates, "P, 2 threads")
    assert stages["teacher"].params["threads"] == 1 and "1.0 GFLOP/s on P, 1 threads" in table["notes"][0]
    assert "GPU" not in table["title"] and " on H" in price_table(stages, rates, "H")["notes"][0]


def test_a_measured_share_is_predicted_back_at_the_batch_of_its_measurement(tmp_path):
    rows = [dict(share=0.4, task="training", row="bf16"), dict(share=0.3, task="sampling", row="bf16")]
    record = dict(device="cuda", peaks=dict(bf16=1e15), rows=rows, config=dict(batch_size=64), date="2026-01-01")
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    from get_nb.lab.price import Assumptions, Job, predict

    a = Assumptions(**read_speeds(tmp_path / "record.json"))
    job = Job("steps", 1, 64, 1e12, "training")
    assert predict(job, 1, a)["hours"] * 3600 == pytest.approx(64 * 1e12 / (0.4 * 1e15))


# Wrong use


@pytest.mark.parametrize(
    "how, said", [(dict(n=0), "n = 0"), (dict(n=2.5), "n = 2.5"), (dict(n=1, out="o.jpg"), "o.jpg: images are")]
)
def test_samples_of_no_number_or_into_another_kind_of_file_are_refused(how, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)):
        sample_to_file("digits-get", how.pop("out", "o.png"), **how)
    assert not list(tmp_path.iterdir())


def test_words_that_mean_nothing_to_a_teacher_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'truncated'"):
        snr_weight(torch.ones(2), "truncate")
    with pytest.raises(ConfigError, match="augment_dim"):
        build_teacher("unet-digits", num_classes=10, image_size=8, channels=1, augment_dim=-1)
    teacher = build_teacher("unet-digits", num_classes=10, image_size=8, channels=1)
    with pytest.raises(ConfigError, match="made without"):
        teacher(torch.zeros(1, 1, 8, 8), 1.0, None, torch.zeros(1, 9))


def test_a_card_names_the_rate_that_was_trained_with_not_the_page_s_own(tmp_path):
    save_record(tmp_path / "get", dict(parameters=1, lr=0.002, steps=9))
    stamp = dict(key=dict(params=dict(lr=0.004, steps=5, gamma=0.8, threads=1)), outputs={}, seconds=1.0)
    (tmp_path / "get/stamp.json").write_text(json.dumps(stamp), encoding="utf-8")
    notes = publishing._shipped_notes(tmp_path / "get", {}, {})
    assert notes["recipe"] == dict(lr=0.002, steps=9, gamma=0.8)
