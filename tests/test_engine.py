"""The training engine: exact resume, several processes, precision, faults."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import toy
from conftest import until
from get_nb.distillation import DistillConfig, distill
from get_nb.lab.core import ConfigError
from get_nb.lab.core import FileError, seed_everything
from get_nb.lab.files import load_tensors, save_tensors
from get_nb.lab.schedule import OPERATION, TrainConfig, shares
from get_nb.lab.state import TrainingError, checkpoints
from get_nb.lab.train import Stopped, train, train_method
from get_nb.presets import build_model

HERE = Path(__file__).parent
ENV = dict(
    os.environ,
    OMP_NUM_THREADS="1",
    GET_NB_PROGRESS="off",
    PYTHONPATH=os.pathsep.join([str(HERE), *filter(None, sys.path)]),
)


def start(folder, *args, processes=1, what="train"):
    "Start the toy in a process, or in several under torchrun."
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "toy", what, str(folder), *args],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def fork(function, *args, **kw):
    "Run a function in a fork of this process, which has torch imported already."
    process = multiprocessing.get_context("fork").Process(
        target=lambda: (torch.set_num_threads(1), function(*args, **kw))
    )
    process.start()
    return process


def crash(at):
    "A watcher that ends the run with an exception at a step."

    def watch(run):
        if run.step == at:
            raise ZeroDivisionError

    return watch


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.fixture(scope="module")
def alone():
    ema, history = toy.fit(None)
    return list(ema.parameters()), history


@contextlib.contextmanager
def full_disk(size):
    "No file can grow beyond this many bytes: the system's own write error, as on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_processes_take_the_steps_of_one_and_one_goes_on_where_two_were_killed(alone, tmp_path):
    process = start(tmp_path, "pause=0.05", processes=2)  # two processes, stopped in the middle ...
    until(lambda: checkpoints(tmp_path / "state"), process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    stopped_at = int(checkpoints(tmp_path / "state")[0].stem[5:])
    assert 10 <= stopped_at < 50
    ema, history = toy.fit(tmp_path / "state")  # ... and one that ends it
    assert history["resumed_at"] == [stopped_at]
    assert all(abs(a / b - 1) < 1e-5 for a, b in zip(history["loss"], alone[1]["loss"])) and len(history["loss"]) == 50
    assert all((p - q).abs().max() < 1e-4 for p, q in zip(ema.parameters(), alone[0]))


def test_a_worker_that_dies_ends_the_job_with_the_reason_and_a_restart_goes_on(alone, tmp_path):
    process = start(tmp_path, "die=25", processes=2)
    _, said = process.communicate(timeout=600)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert int(checkpoints(tmp_path / "state")[0].stem[5:]) == 20
    ema, history = toy.fit(tmp_path / "state")
    assert history["resumed_at"] == [20] and all((p - q).abs().max() < 1e-4 for p, q in zip(ema.parameters(), alone[0]))


def test_three_kills_at_random_moments_change_no_bit(alone, tmp_path):
    rng, newest = random.Random(0), lambda: max([int(p.stem[5:]) for p in checkpoints(tmp_path)], default=0)
    for _ in range(3):
        before, process = newest(), fork(toy.fit, tmp_path, pause=0.02)
        while process.is_alive() and newest() == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
    ema, history = toy.fit(tmp_path)
    assert equal(ema.parameters(), alone[0]) and history["loss"] == alone[1]["loss"] and history["resumed_at"]


def test_sigterm_leaves_a_checkpoint_of_the_very_step_and_code_143(alone, tmp_path):
    def terminate(run):
        if run.step == 33:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as stop:
        toy.fit(tmp_path, watch=terminate)
    assert stop.value.code == 143 and int(checkpoints(tmp_path)[0].stem[5:]) in (33, 34)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert equal(toy.fit(tmp_path)[0].parameters(), alone[0])


def test_what_only_says_how_may_change_on_resume_and_what_says_what_may_not(alone, tmp_path):
    with pytest.raises(ZeroDivisionError):
        toy.fit(tmp_path, watch=crash(25))
    with pytest.raises(
        FileError, match=f"made with lr = 0.003, now 0.001; to start again, delete the folder {tmp_path}"
    ):
        toy.fit(tmp_path, lr=1e-3)
    ema, _ = toy.fit(tmp_path, accumulate=4, checkpoint_every=7, keep=3)
    assert all((p - q).abs().max() < 1e-4 for p, q in zip(ema.parameters(), alone[0]))
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path)] == [50, 49, 42]
    assert OPERATION < set(TrainConfig.__dataclass_fields__)


def test_a_run_resumed_with_more_points_to_its_curve_keeps_drawing_it(tmp_path):
    with pytest.raises(ZeroDivisionError):
        toy.fit(tmp_path, watch=crash(30), log_every=15)  # the checkpoint of step 20 holds a window of 5
    _, history = toy.fit(tmp_path, log_every=2)
    assert history["resumed_at"] == [20] and history["step"] == [15, 21, *range(23, 50, 2)]


def test_an_error_without_text_in_one_of_several_processes_is_named_by_its_kind(monkeypatch):
    def fail(*_):
        raise NotImplementedError

    several, method = SimpleNamespace(world=2, rank=1), SimpleNamespace(networks=dict(model=torch.nn.Linear(1, 1)))
    run = SimpleNamespace(model=None, processes=several, step=3, folder=None, formulation=None)
    monkeypatch.setattr("get_nb.lab.train.start_run", lambda *_: run)
    monkeypatch.setattr("get_nb.lab.train.load_state", lambda _: False)
    monkeypatch.setattr("get_nb.lab.train._loop", fail)
    with pytest.raises(TrainingError, match=r"process 1 failed after step 3.*\(NotImplementedError\)"):
        train_method(method, TrainConfig(steps=5), desc="toy")


def test_a_damaged_checkpoint_is_set_aside_and_all_damaged_means_from_the_start(alone, tmp_path, capsys):
    toy.fit(tmp_path)
    rng = random.Random(0)
    for _ in range(3):
        path = checkpoints(tmp_path)[0]
        bad = bytearray(path.read_bytes())
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad if rng.random() < 0.7 else bad[: rng.randrange(len(bad))])
        ema, _ = toy.fit(tmp_path)
        assert equal(ema.parameters(), alone[0]) and f"{path}: " in capsys.readouterr().err
    for path in checkpoints(tmp_path):
        path.write_bytes(b"")
    ema, history = toy.fit(tmp_path)
    assert history["resumed_at"] == [] and equal(ema.parameters(), alone[0])


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(alone, tmp_path):
    def fill(run):
        if run.step == 25:
            limit.enter_context(full_disk(2000))

    with (
        contextlib.ExitStack() as limit,
        pytest.raises(
            TrainingError, match=r"checkpoint of step 30 cannot be written .* the last good checkpoint is .*step 20"
        ),
    ):
        toy.fit(tmp_path, watch=fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010.safetensors", "step-00000020.safetensors"]
    assert equal(toy.fit(tmp_path)[0].parameters(), alone[0])


def test_a_folder_that_vanishes_is_named(tmp_path):
    state = tmp_path / "state"
    with pytest.raises(TrainingError, match="its folder has vanished"):
        toy.fit(state, watch=lambda run: state.rename(tmp_path / "gone") and None if run.step == 15 else None)
    assert not state.exists()


def test_a_nan_is_skipped_when_asked_and_what_follows_does_not_depend_on_interruption(tmp_path):
    with pytest.raises(TrainingError, match="loss nan.* at step 25; the last good checkpoint is .*step 20"):
        toy.fit(tmp_path / "stop", poison=25)
    a, history = toy.fit(tmp_path / "a", poison=25, on_bad="skip")
    assert history["skipped"] == [25] and len(history["loss"]) == 49
    with pytest.raises(ZeroDivisionError):
        toy.fit(tmp_path / "b", poison=25, on_bad="skip", watch=crash(44))
    b, history = toy.fit(tmp_path / "b", poison=25, on_bad="skip")
    assert history["skipped"] == [25] and history["resumed_at"] == [40] and equal(a.parameters(), b.parameters())
    with pytest.raises(ConfigError, match="needs a state_dir"):
        toy.fit(None, on_bad="skip")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_resumes_exactly_and_ends_near_float32(alone, tmp_path, precision):
    once, history = toy.fit(None, precision=precision)
    with pytest.raises(ZeroDivisionError):
        toy.fit(tmp_path, precision=precision, watch=crash(25))
    assert equal(toy.fit(tmp_path, precision=precision)[0].parameters(), once.parameters())
    assert history["loss"][-1] == pytest.approx(alone[1]["loss"][-1], rel=0.05) and history["loss"] != alone[1]["loss"]


@pytest.fixture(scope="module")
def gan_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan")
    _, history = toy.gan(folder)
    return load_tensors(checkpoints(folder)[0])[0], history


def same_run(folder, history, wanted):
    "The same networks, averages, optimizers and curves, bit for bit?"
    tensors = load_tensors(checkpoints(folder)[0])[0]
    same = tensors.keys() == wanted[0].keys() and all(torch.equal(tensors[k], wanted[0][k]) for k in tensors)
    return same and all(history[k] == wanted[1][k] for k in ("curves", "monitor"))


def test_two_processes_train_a_gan_as_one_does_and_one_goes_on_where_two_were_stopped(gan_alone, tmp_path):
    process = start(tmp_path, "pause=0.1", processes=2, what="gan")
    while not checkpoints(tmp_path / "state"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    stopped_at = int(checkpoints(tmp_path / "state")[0].stem[5:])
    assert 4 <= stopped_at < 12
    ema, history = toy.gan(tmp_path / "state")
    tensors, wanted = load_tensors(checkpoints(tmp_path / "state")[0])[0], gan_alone[0]
    assert history["resumed_at"] == [stopped_at]
    for name, curve in gan_alone[1]["curves"].items():
        assert history["curves"][name] == pytest.approx(curve, rel=1e-4, abs=1e-6), name
    assert all((tensors[k] - wanted[k]).abs().max() < 1e-4 for k in wanted if k[0] in "gde")


def test_a_gan_that_is_killed_twice_ends_with_the_bits_of_one_that_was_not(gan_alone, tmp_path):
    rng, newest = random.Random(0), lambda: max([int(p.stem[5:]) for p in checkpoints(tmp_path)], default=0)
    for _ in range(2):
        before, process = newest(), fork(toy.gan, tmp_path, pause=0.02)
        while process.is_alive() and newest() == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
    _, history = toy.gan(tmp_path)
    assert history["resumed_at"] and same_run(tmp_path, history, gan_alone)


def test_a_gan_leaves_a_checkpoint_at_sigterm_and_resumes_from_it_with_the_same_bits(gan_alone, tmp_path):
    with pytest.raises(Stopped) as stop:
        toy.gan(tmp_path, at={5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert stop.value.code == 143 and int(checkpoints(tmp_path)[0].stem[5:]) in (6, 7)
    _, history = toy.gan(tmp_path)
    assert history["resumed_at"] and same_run(tmp_path, history, gan_alone)


def test_a_gans_bad_loss_stops_it_or_is_skipped(tmp_path):
    with pytest.raises(
        TrainingError, match=r"extra nan.* at step 6; the last good checkpoint is .*, step 4\. Lower lr"
    ):
        toy.gan(tmp_path / "stop", poison=6)
    a, history = toy.gan(tmp_path / "a", poison=6, on_bad="skip")
    assert len(history["curves"]["generator"]) == 11 and all(p.isfinite().all() for p in a.parameters())
    with pytest.raises(ZeroDivisionError):
        toy.gan(tmp_path / "b", poison=6, on_bad="skip", at={9: lambda: 1 / 0})
    b, history = toy.gan(tmp_path / "b", poison=6, on_bad="skip")
    assert history["resumed_at"] == [8] and equal(a.parameters(), b.parameters())


def test_a_gan_in_two_passes_per_step_takes_the_steps_of_one_pass(gan_alone):
    _, history = toy.gan(None, accumulate=2, steps=3)
    for name, curve in gan_alone[1]["curves"].items():
        assert history["curves"][name] == pytest.approx(curve[:3], rel=0.02), name  # spectral norms see more passes


def test_shares_cover_a_batch_once_in_order():
    for batch in (1, 7, 64):
        for world in (1, 2, 3):
            for accumulate in (1, 2):
                if world * accumulate > batch:
                    with pytest.raises(ConfigError):
                        shares(batch, 0, world, accumulate)
                    continue
                parts = [list(range(batch))[s] for r in range(world) for s in shares(batch, r, world, accumulate)]
                assert sum(parts, []) == list(range(batch)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_tensorboard_log_holds_each_point_of_the_curve_once_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from get_nb.lab.monitor import Watcher

    def look(ema, step):
        return dict(weight=next(ema.parameters()).norm(), grid=torch.zeros(4, 6, dtype=torch.uint8).numpy())

    with pytest.raises(ZeroDivisionError):
        end, watcher = crash(37), Watcher(look, 10, tmp_path / "pictures", tmp_path / "board")
        toy.fit(
            tmp_path / "state", log_every=5, watch=lambda run: watcher(run) if run.step != 35 else end(run) or 1 / 0
        )
    _, history = toy.fit(
        tmp_path / "state", log_every=5, watch=Watcher(look, 10, tmp_path / "pictures", tmp_path / "board")
    )
    log = EventAccumulator(str(tmp_path / "board"))
    log.Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in log.Scalars("loss")] == list(
        zip(history["step"], history["loss"])
    )
    assert {"lr", "weight"} <= set(log.Tags()["scalars"]) and "grid" in log.Tags()["images"]
    assert (tmp_path / "pictures/grid-00000050.png").is_file()


def test_compiled_methods_are_used_while_training_and_gone_afterwards(alone, monkeypatch):
    used, runs = [], []
    monkeypatch.setattr(torch, "compile", lambda f, mode: lambda *args: used.append(mode) or f(*args))
    ema, _ = toy.fit(None, compile="reduce-overhead", watch=lambda run: runs.append(run))
    assert used == ["reduce-overhead"] * 50 and equal(ema.parameters(), alone[0])
    assert "forward" not in vars(runs[0].model)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    toy.fit(tmp_path, steps=20)
    before = sorted(tmp_path.iterdir())

    def closed(path, mode="r", *args, **kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("get_nb.lab.files.open", closed, raising=False)
    with pytest.raises(FileError, match="step-00000020.safetensors: cannot be read: Permission denied"):
        toy.fit(tmp_path, steps=20)
    assert sorted(tmp_path.iterdir()) == before


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    save_tensors(tmp_path / "a.safetensors", dict(x=torch.ones(2)), {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_skipping_with_no_checkpoint_left_stops(tmp_path):
    def lose(run):
        for path in tmp_path.glob("step-*"):
            path.unlink()

    with pytest.raises(TrainingError, match="nothing to go back to"):
        toy.fit(tmp_path, on_bad="skip", poison=25, watch=lose)


class FewPairs:
    "Eight pairs in memory."

    manifest, num_classes = dict(shards=[]), 0

    def __len__(self):
        return 8

    def batch(self, index):
        noise = torch.randn((8, 1, 8, 8), generator=torch.Generator().manual_seed(0))[index]
        return dict(noise=noise, label=torch.full((len(index),), -1), image=noise.tanh())


def huber(image, target):
    return torch.nn.functional.huber_loss(image, target)


def cubed(image, target):
    return (image - target).abs().pow(3).mean()


def students_steps(folder=None, distance=None, pairs=None, cfg=None, **change):
    seed_everything(0)
    model = build_model("GET-digits/2", image_size=8, channels=1, dim=16, heads=2)
    how = TrainConfig(**dict(steps=4, batch_size=4, checkpoint_every=2) | change)
    return distill(model, pairs or FewPairs(), cfg or DistillConfig(n_iter=2), how, folder, distance=distance)


def test_a_distillation_is_not_resumed_with_another_distance(tmp_path):
    students_steps(tmp_path, huber)
    students_steps(tmp_path, huber)
    for other in (cubed, None, torch.nn.HuberLoss()):
        with pytest.raises(FileError, match="made with distance = .*huber"):
            students_steps(tmp_path, other)


def test_a_checkpoint_that_does_not_know_its_distance_is_resumed(tmp_path):
    students_steps(tmp_path, huber)
    for path in checkpoints(tmp_path):
        tensors, info = load_tensors(path)
        del info["config"]["distance"]
        save_tensors(path, tensors, info)
    assert students_steps(tmp_path, huber)[1]["resumed_at"] == [4]


@pytest.mark.parametrize(
    "distance",
    [
        lambda x, y: (x - y).abs().flatten(1).mean(1),
        lambda x, y: dict(loss=(x - y).abs().mean()),
        lambda x, y: (x - y).abs().mean().item(),
    ],
    ids=["vector", "dict", "float"],
)
def test_a_distance_that_is_no_scalar_is_one_line(distance):
    with pytest.raises(ConfigError, match="distance: a scalar tensor is needed"):
        students_steps(distance=distance)


def test_pairs_without_a_manifest_are_one_line():
    for manifest in (None, {}, []):
        pairs = FewPairs()
        pairs.manifest = manifest
        with pytest.raises(ConfigError, match="pairs: no manifest"):
            students_steps(pairs=pairs)


def test_a_student_that_does_not_see_its_pairs_labels_is_warned_of():
    pairs = FewPairs()
    students_steps(pairs=pairs)
    pairs.num_classes = 10
    with pytest.warns(UserWarning, match=r"PairsConfig\(num_classes=0\)"):
        students_steps(pairs=pairs)


def test_named_scalars_have_curves_and_a_short_run_has_one_point():
    model, cfg = torch.nn.Linear(2, 1), TrainConfig(steps=3, batch_size=2, log_every=50)

    def loss_fn(model, step, share):
        loss = model(torch.ones(2, 2)[share]).square().mean()
        return dict(main=loss, more=2 * loss)

    history = train(model, loss_fn, cfg)[1]
    assert history["step"] == [3] and len(history["main"]) == len(history["more"]) == 1 and "loss" not in history
    longer = train(model, lambda *a: loss_fn(*a)["main"], TrainConfig(steps=7, batch_size=2, log_every=3))[1]
    assert longer["step"] == [3, 6] and len(longer["loss"]) == 2
