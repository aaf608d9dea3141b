"""The other one-step families: their costs are counted, their runs resume, their failures are said, their critics do not grade themselves."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import ROOT, in_process
from get_nb.lab.core import ConfigError, seed_everything
from get_nb.lab.data import load_data
from get_nb.discriminator import ClassifierPyramid, Discriminator, DiscriminatorConfig, Head
from get_nb.lab.backbones import load_backbone
from get_nb.distillation import DistillConfig
from get_nb.evaluation import cost, family, training_cost
from get_nb.lab.checkpoints import load_checkpoint
from get_nb.lab.core import FileError
from get_nb.lab.files import load_tensors, save_checkpoint
from get_nb.gdd import GDD, GanConfig, freeze_innate, train_gan
from get_nb.lab.counting import flops
from get_nb.lab.monitor import gan_cost
from get_nb.losses import l2
from get_nb.meanflow import MeanFlowConfig, create_meanflow, meanflow_loss, train_meanflow
from get_nb.consistency import Consistency, ConsistencyConfig, consistency_loss, distill_consistency
from get_nb.hybrid import refine
from get_nb.kd import OneStep, copy_denoiser, create_one_step
from get_nb.lab.classifier import create_classifier
from get_nb.lab.checkpoints import create_model
from get_nb.lab.generation import generate_pairs
from get_nb.lab.store import PairDataset
from get_nb.pairs import PairsConfig
from get_nb.progressive import ProgressiveConfig, distill_progressively
from get_nb.precond import IdealDenoiser
from get_nb.sampler import edm_sigmas, heun_step
from get_nb.lab.profiles import load_profile
from get_nb.lab.schedule import TrainConfig
from get_nb.lab.state import checkpoints
from get_nb.lab.checkpoints import create_teacher

SHAPE = dict(num_classes=10, image_size=8, channels=1)
DIGITS = load_data("digits")
CFG = replace(GDD, steps=6, batch_size=8, lr=1e-3, checkpoint_every=2, log_every=2)
GAN = GanConfig(lr_critic=1e-3, monitor_every=2, r1_every=3)


def teacher():
    seed_everything(0, "teacher")
    return create_teacher("unet-digits", base=8, **SHAPE).eval()


def critic(classes=10):
    seed_everything(0, "critic")
    eyes = create_classifier(width=4, **SHAPE)
    return Discriminator([ClassifierPyramid(eyes)], DIGITS.batch([0])[0], DiscriminatorConfig(dim=8, width=8), classes)


def generator(innate=False):
    model = OneStep(copy_denoiser(teacher()))
    if innate:
        freeze_innate(model)
    return model


def batch(step):
    return DIGITS.batch(range(8 * step, 8 * step + 8))


def stopped(at, f=batch):
    def g(step):
        if step == at:
            raise KeyboardInterrupt
        return f(step)

    return g


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    generate_pairs(
        teacher(),
        folder,
        PairsConfig(n=32, num_classes=10, shape=(1, 8, 8), num_steps=2, shard_size=16, batch_size=16, teacher="t"),
    )
    return PairDataset(folder)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_stopped_hybrid_ends_with_the_bits_of_one_that_was_not(pairs, tmp_path, monkeypatch, at):
    def run(folder, real=None):
        seed_everything(0, "get")
        student = create_model("GET-digits/2", **SHAPE)
        if real:
            monkeypatch.setattr("get_nb.hybrid.real_batches", lambda *a: real)
        return refine(
            student,
            critic(),
            pairs,
            DIGITS,
            CFG,
            replace(GAN, n_iter=2),
            DistillConfig(n_iter=2),
            3.0,
            state_dir=folder,
            monitor=lambda m: 1.0,
        )

    _, once = run(tmp_path / "once", batch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice", stopped(at))
    _, again = run(tmp_path / "twice", batch)
    assert same(*(load_tensors(checkpoints(tmp_path / f)[0])[0] for f in ("once", "twice")))
    assert (
        once["curves"] == again["curves"]
        and once["monitor"] == again["monitor"]
        and again["resumed_at"] == ([at // 2 * 2] if at > 1 else [])
    )


def test_a_stopped_halving_goes_on_in_its_round_and_ends_the_same(tmp_path, monkeypatch):
    cfg, train_cfg = ProgressiveConfig(start=4), TrainConfig(steps=4, batch_size=8, checkpoint_every=2)

    def run(folder):
        return {
            n: student.state_dict()
            for n, student, _, _ in distill_progressively(
                copy_denoiser(teacher()), DIGITS, cfg, train_cfg, state_dir=folder
            )
        }

    once, calls = run(tmp_path / "once"), []
    import get_nb.progressive as module

    real = module.draw_examples

    def failing(*args):
        calls.append(args)
        if len(calls) == 7:  # step 2 of the second round
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "draw_examples", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice")
    again = run(tmp_path / "twice")
    assert len(calls) == 7 + 2 and all(same(once[n], again[n]) for n in (2, 1))  # the first round was not trained again


SHORT = TrainConfig(steps=4, batch_size=8, lr=1e-3, checkpoint_every=2, log_every=1)


def meanflow(classes=10):
    seed_everything(0, "meanflow")
    return create_meanflow("unet-digits", base=8, **SHAPE | dict(num_classes=classes))


def without_pairs(method, folder=None, data=DIGITS, cfg=SHORT, classes=True):
    "Train one of the rivals that see real images alone; -> average, history."
    if method == "meanflow":
        return train_meanflow(meanflow(10 if classes else 0), data, MeanFlowConfig(), cfg, folder)
    frozen = copy_denoiser(teacher()).eval().requires_grad_(False)
    return distill_consistency(frozen, data, ConsistencyConfig(num_steps=5), cfg, classes, folder)


class Cut:
    "Digits whose batch cannot be had at the n-th call."

    def __init__(self, n):
        self.calls, self.n = 0, n

    def __len__(self):
        return len(DIGITS)

    def __getattr__(self, name):
        return getattr(DIGITS, name)

    def batch(self, index):
        self.calls += 1
        if self.calls == self.n:
            raise KeyboardInterrupt
        return DIGITS.batch(index)


@pytest.mark.parametrize("method", ["consistency", "meanflow"])
def test_a_stopped_run_without_pairs_ends_with_the_bits_of_one_that_was_not(method, tmp_path):
    once, whole = without_pairs(method, tmp_path / "once")
    with pytest.raises(KeyboardInterrupt):
        without_pairs(method, tmp_path / "twice", Cut(4))
    again, rest = without_pairs(method, tmp_path / "twice")
    assert rest["resumed_at"] == [2] and whole["loss"] == rest["loss"] and same(once.state_dict(), again.state_dict())


@pytest.mark.parametrize("method", ["consistency", "meanflow"])
def test_shares_of_a_batch_add_up_to_the_whole_of_it(method):
    whole, parts = (without_pairs(method, cfg=replace(SHORT, steps=1, accumulate=n))[1]["loss"] for n in (1, 3))
    assert whole == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("method", ["consistency", "meanflow"])
def test_a_run_without_classes_does_not_depend_on_the_labels(method):
    other = replace(DIGITS, labels=DIGITS.labels.flip(0))
    losses = {
        classes: [without_pairs(method, data=d, classes=classes)[1]["loss"] for d in (DIGITS, other)]
        for classes in (False, True)
    }
    assert losses[False][0] == losses[False][1] and losses[True][0] != losses[True][1]


def test_what_costs_consistency_distillation_and_meanflow_is_counted():
    x, y = DIGITS.batch(range(4))
    frozen = copy_denoiser(teacher()).eval().requires_grad_(False)
    once = flops(lambda: frozen(x, torch.ones(4), y))
    student, place = Consistency(copy_denoiser(teacher())), torch.zeros(4, dtype=torch.int64)
    args = frozen, x, y, x, place, edm_sigmas(5)[:-1], l2
    counted = flops(lambda: consistency_loss(student, *args).backward()) / once
    assert 5.7 < counted < 6.1  # forward and backward, its target, two teacher evaluations
    model, t = meanflow(), torch.full((4,), 0.7)
    loss = flops(lambda: meanflow_loss(lambda *z: model.velocity(*z, y), x, x, t, t / 2)["loss"].backward()) / once
    assert 4.7 < loss < 5.3  # forward, backward, and a derivative that costs two more


def test_a_meanflow_checkpoint_comes_back_as_what_it_was(tmp_path):
    model, noise = meanflow().eval(), torch.randn(3, 1, 8, 8)
    save_checkpoint(tmp_path / "m.safetensors", model, family="meanflow")
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert family(again) == "meanflow" and cost(again)["evaluations"] == 1
    with torch.no_grad():
        assert torch.equal(model(noise, torch.arange(3)), again(noise, torch.arange(3)))
    with pytest.raises(ConfigError, match="did you mean 'unet-digits'"):
        create_meanflow("unet-digit", **SHAPE)


def test_a_consistency_function_is_the_identity_at_its_lowest_level_whatever_its_weights():
    f, x = Consistency(teacher(), sigma_min=0.01), torch.randn(4, 1, 8, 8)
    for p in f.parameters():
        torch.nn.init.normal_(p)
    with torch.no_grad():
        assert torch.equal(f(x, 0.01), x.double()) and not torch.equal(f(x, 0.011), x.double())


def test_one_level_is_no_consistency_distillation():
    with pytest.raises(ConfigError, match="at least two levels"):
        distill_consistency(teacher(), DIGITS, ConsistencyConfig(num_steps=1), SHORT)


def seen_labels(steps, conditional=False, **options):
    "The labels of every call of teacher and student in progressive distillation."
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = teacher()

        def forward(self, x, sigma, labels=None):
            seen.append(labels)
            return self.net(x, sigma, labels)

        def __deepcopy__(self, memo):
            return Spy()

    cfg = ProgressiveConfig(**options)
    for _ in distill_progressively(Spy(), DIGITS, cfg, TrainConfig(steps=steps, batch_size=4), conditional=conditional):
        pass
    return seen


def test_progressive_distillation_without_classes_never_shows_a_label():
    seen = seen_labels(2, start=2)
    assert len(seen) == 6 and all(y is None for y in seen)


@pytest.mark.parametrize("solver, first", [("ddim", 2), ("heun", 4)])
def test_only_the_first_halving_asks_its_teacher_for_heun_s_steps(solver, first):
    assert len(seen_labels(1, start=8, solver=solver)) == (first + 1) + 2 * (2 + 1)


def test_a_step_of_heun_s_that_ends_at_zero_is_euler_s_whatever_is_beside_it():
    denoiser, g = IdealDenoiser(DIGITS.batch(range(20))[0]), torch.Generator().manual_seed(0)
    s, s1 = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1, 1) for v in ([2.0, 0.01, 0.5], [1.0, 0.0, 0.0]))
    x = s * torch.randn(3, 1, 8, 8, generator=g, dtype=torch.float64)
    together = heun_step(denoiser, x, s, s1)
    alone = torch.cat([heun_step(denoiser, x[i : i + 1], s[i : i + 1], s1[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    euler = x + (s1 - s) * (x - denoiser(x.float(), s.flatten().float())) / s
    assert torch.allclose(together[1:], euler[1:], atol=1e-6) and (together[0] - euler[0]).abs().max() > 1e-3


def test_a_gan_state_of_another_run_is_refused(tmp_path):
    train_gan(generator(), critic(), batch, 10, CFG, GAN, state_dir=tmp_path)
    with pytest.raises(FileError, match="made with r1_gamma"):
        train_gan(generator(), critic(), batch, 10, CFG, replace(GAN, r1_gamma=1.0), state_dir=tmp_path)


def test_adversarial_training_refuses_fp16():
    with pytest.raises(ConfigError, match="needs bf16 or float32"):
        train_gan(generator(), critic(), batch, 10, replace(CFG, precision="fp16"), GAN)


def test_the_curves_of_a_gan_end_with_the_steps_after_the_last_full_point():
    _, history = train_gan(generator(), critic(), batch, 10, replace(CFG, log_every=4), GAN)
    assert history["curves"]["step"] == [4, 6] and len(history["curves"]["critic"]) == 2


def test_gdd_i_leaves_frozen_layers_as_they_were_and_gdd_moves_them():
    start = generator().state_dict()
    for innate in (True, False):
        ema, _ = train_gan(generator(innate), critic(), batch, 10, CFG, GAN)
        moved = {k for k, v in ema.state_dict().items() if not torch.equal(v, start[k])}
        convs = {k for k in start if k.split(".")[-2] in ("conv0", "conv1", "proj")}
        assert moved - convs and bool(moved & convs) != innate


def test_an_unconditional_generator_and_critic_train_without_labels():
    seen = []

    def monitor(model):
        seen.append(model(torch.zeros(1, 1, 8, 8), None).shape)
        return 1.0

    train_gan(generator(), critic(0), lambda step: (batch(step)[0], None), 0, CFG, GAN, monitor=monitor)
    assert len(seen) == 3


def test_a_one_step_checkpoint_comes_back_as_what_it_was_with_its_family(tmp_path):
    model = generator()
    save_checkpoint(tmp_path / "s.safetensors", model, family="kd")
    again = load_checkpoint(tmp_path / "s.safetensors")
    assert (
        isinstance(again, OneStep)
        and family(again) == "kd"
        and family(model) == "vit"
        and same(model.state_dict(), again.state_dict())
    )
    assert cost(again)["evaluations"] == 1 and again.config["sigma_max"] == 80.0
    with pytest.raises(ConfigError, match="did you mean 'unet-digits'"):
        create_one_step("unet-digit", **SHAPE)


def test_the_command_line_evaluates_a_one_step_student_and_refuses_it_steps(tmp_path, capsys):
    save_checkpoint(tmp_path / "s.safetensors", generator(), family="gdd")
    save_checkpoint(tmp_path / "c.safetensors", create_classifier(width=4, **SHAPE))
    words = ["evaluate", tmp_path / "s.safetensors", "--classifier", tmp_path / "c.safetensors", "--n", 100]
    code, out, err = in_process(capsys, *words)
    assert code == 0 and json.loads(out)["kind"] == "gdd", err
    code, _, err = in_process(capsys, *words, "--steps", 4)
    assert code == 2 and "takes neither --steps" in err


def test_a_backbone_takes_local_weights_and_refuses_missing_and_damaged_ones(tmp_path):
    import timm
    from safetensors.torch import save_file

    name = "tf_efficientnet_lite0"
    full = timm.create_model(name)
    save_file(full.state_dict(), tmp_path / f"{name}.safetensors")
    net = load_backbone(name, tmp_path, resolution=32).net
    assert torch.equal(next(net.parameters()), full.conv_stem.weight) and not any(
        p.requires_grad for p in net.parameters()
    )
    for bad in (b"", (tmp_path / f"{name}.safetensors").read_bytes()[:-1000]):
        (tmp_path / f"{name}.safetensors").write_bytes(bad)
        with pytest.raises(FileError, match=f"{name}.safetensors: cannot be loaded"):
            load_backbone(name, tmp_path)
    with pytest.raises(FileError, match="vgg16_bn.safetensors: no such file"):
        load_backbone("vgg16_bn", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'vgg16_bn'"):
        load_backbone("vgg16", tmp_path)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8, 14, 56])
@pytest.mark.parametrize("width", [6, 8])
def test_a_head_reads_a_map_of_any_size_into_one_logit_per_image(size, width):
    head = Head(width, width, size, 10)
    assert head(torch.randn(3, width, size, size), torch.tensor([0, 1, 2])).shape == (3,)
    assert head.logit.weight.shape[-1] <= 4 and head.logit.weight.shape == (1, width, *head.whole.weight.shape[2:])


def test_costs_are_counted_a_frozen_layer_saves_some_and_a_pair_term_adds_its_own(pairs):
    x, y = DIGITS.batch(range(4))
    full, innate = (gan_cost(generator(i), critic(), x, y, GanConfig()) for i in (False, True))
    assert innate < full
    forward = 2 * cost(generator())["gmac"]
    assert 2.5 * forward < training_cost(generator(), DistillConfig(n_iter=1))["train_gflop"] < 3.1 * forward
    extra = gan_cost(generator(), critic(), x, y, GanConfig(), lambda m, step, share: m(x, y).square().mean())
    assert 2.5 * forward < extra - full < 3.1 * forward


def test_no_method_is_graded_by_the_network_it_was_trained_against():
    for profile in ("smoke", "cpu-full"):
        stages = load_profile(ROOT, profile)
        eyes = {s.inputs["eyes"] for s in stages.values() if "eyes" in s.inputs}
        judges = {s.inputs["classifier"] for s in stages.values() if s.notebook.stem == "evaluate"}
        assert eyes and judges and not eyes & judges
        assert all(
            stages[e].params["seed"] != stages[j].params["seed"]
            and stages[e].params["overrides"] != stages[j].params["overrides"]
            for e in eyes
            for j in judges
        )


def test_the_families_that_are_compared_get_the_same_compute_and_four_rates_or_three_seeds():
    stages = load_profile(ROOT, "cpu-full")
    assert len({stages[n].params["lr"] for n in ("kd_low", "kd_mid", "kd_high", "kd_top")}) == 4
    compared = [t for row in stages["table_6_families"].rows.values() for t in row.get("training", [])]
    methods = ("kd", "progressive", "consistency", "meanflow", "gdd")
    equal = [t for t in compared if stages[t].notebook.stem in methods]
    assert {stages[t].params["tflop"] for t in equal} == {11.0}
    assert {stages[t].notebook.stem for t in equal} == set(methods)
    for method in ("progressive", "consistency", "meanflow", "gdd_i", "hybrid"):
        assert [stages[f"{method}_{s}"].params["seed"] for s in (0, 1, 2)] == [0, 1, 2]
    assert [stages[f"hybrid_{s}"].inputs["student"] for s in (0, 1, 2)] == ["get_0", "get_1", "get_2"]


@pytest.mark.parametrize("method, budget", [("progressive", 2.75), ("consistency", 11.0), ("meanflow", 2.75)])
def test_a_rate_that_is_used_lies_inside_the_four_that_were_tried(method, budget):
    stages = load_profile(ROOT, "cpu-full")
    rows = stages["table_6_rates"].rows
    shown = {t for row in rows.values() for t in row["training"]}
    used = {k: v for k, v in stages[f"{method}_0"].params.items() if k not in ("lr", "tflop", "seed", "samples", "out")}
    alike = [stages[t].params for t in shown if used.items() <= stages[t].params.items()]
    rates = sorted(p["lr"] for p in alike if p["tflop"] == budget)
    assert len(set(rates)) == len(rates) == 4
    chosen = {stages[f"{method}_{s}"].params["lr"] for s in (0, 1, 2)} | {stages[f"{method}_uncond"].params["lr"]}
    assert len(chosen) == 1 and rates[0] < chosen.pop() < rates[-1]
