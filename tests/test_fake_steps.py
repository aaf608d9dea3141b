"""Training steps of every method and every feature network on a GPU that is not there: the CPU waits at logging points alone."""

from functools import partial
from unittest import mock

import pytest
import torch
from fake_gpu import FakeGPU, Waits, left_behind, without_backward
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch_fidelity import feature_extractor_inceptionv3 as inceptionv3
from torchvision.models import vgg16

import get_nb.lab.train as training
from get_nb.consistency import ConsistencyConfig, distill_consistency
from get_nb.discriminator import ClassifierPyramid, Discriminator, DiscriminatorConfig
from get_nb.distillation import DistillConfig, distill
from get_nb.gdd import GanConfig, freeze_innate, real_batches, train_gan
from get_nb.hybrid import refine
from get_nb.kd import OneStep, copy_denoiser
from get_nb.lab.backbones import BACKBONES, load_backbone
from get_nb.lab.classifier import create_classifier, train_classifier
from get_nb.lab.core import send
from get_nb.lab.evaluate import training_formulation
from get_nb.lab.images import ImageSet
from get_nb.lab.metrics import FeatureNetwork, load_features
from get_nb.lab.files import save_checkpoint
from get_nb.lab.perceptual import load_vgg16
from get_nb.lab.schedule import TrainConfig
from get_nb.lab.train import train
from get_nb.losses import VGG_CHANNELS, make_dists, make_lpips
from get_nb.meanflow import MeanFlowConfig, create_meanflow, train_meanflow
from get_nb.precond import edm_loss
from get_nb.presets import build_model
from get_nb.progressive import ProgressiveConfig, distill_progressively
from get_nb.teachers import build_teacher

SHAPE = dict(num_classes=3, image_size=8, channels=1)
UNET = dict(base=8, mult=(1,), blocks=1, attention=(8,))
TINY = dict(dim=16, heads=2, depth=1, deq_depth=1)
DATA = ImageSet(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 3, ("a", "b", "c"), "toy/train")
TWICE = DistillConfig(n_iter=2)
SAID = (Waits, DataDependentOutputException)


class Pairs:
    "Six pairs on the CPU, as PairDataset gives them."

    manifest, num_classes = dict(shards=[]), 3

    def __len__(self):
        return 6

    def batch(self, index):
        shape = (len(index), 1, 8, 8)
        return dict(noise=torch.zeros(shape), image=torch.zeros(shape), label=torch.as_tensor(index) % 3)


def get(**options):
    return build_model("GET-digits-30/2", **SHAPE, **TINY | options).to("cuda")


def teacher():
    return build_teacher("unet-digits", **SHAPE, **UNET).to("cuda")


def critic():
    pyramid, probe = ClassifierPyramid(create_classifier(width=4, **SHAPE)).to("cuda"), torch.zeros(1, 1, 8, 8)
    return Discriminator([pyramid], probe.to("cuda"), DiscriminatorConfig(dim=4, width=4), 3).to("cuda")


def teach(cfg, loss=edm_loss):
    net = teacher()

    def loss_fn(model, step, share):
        x, y = (send(v[share], "cuda") for v in DATA.batch(range(4)))
        return loss(model, x, y, x, x.mean((1, 2, 3)), -1.2, 1.2)

    train(net, loss_fn, cfg)


def fast(cfg, **options):
    model = get(**options)
    distill(model, Pairs(), TWICE, cfg, formulation=training_formulation(model, TWICE, cfg))


def adversarial(cfg, frozen=False):
    generator = OneStep(copy_denoiser(teacher()))
    if frozen:
        freeze_innate(generator)
    train_gan(generator, critic(), real_batches(DATA, 4, 0), 3, cfg, GanConfig(r1_every=2))


def meanflow(cfg):
    train_meanflow(create_meanflow("unet-digits", **SHAPE, **UNET).to("cuda"), DATA, MeanFlowConfig(), cfg)


METHODS = {
    "teacher": teach,
    "classifier": lambda cfg: train_classifier(create_classifier(width=4, **SHAPE).to("cuda"), DATA, cfg),
    "GET": lambda cfg: distill(get(), Pairs(), TWICE, cfg),
    "fast GET": fast,
    "ViT": lambda cfg: distill(build_model("ViT-digits/2", **SHAPE).to("cuda"), Pairs(), TWICE, cfg),
    "penalties": lambda cfg: distill(get(), Pairs(), DistillConfig(n_iter=2, residual=0.1, jacobian=0.1), cfg),
    "random iterations": lambda cfg: distill(
        get(), Pairs(), DistillConfig(iterations="random", n_iter=1, n_iter_max=3), cfg
    ),
    "KD": lambda cfg: distill(OneStep(copy_denoiser(teacher())), Pairs(), TWICE, cfg),
    "progressive": lambda cfg: list(distill_progressively(teacher(), DATA, ProgressiveConfig(start=2), cfg)),
    "progressive, Heun": lambda cfg: list(
        distill_progressively(teacher(), DATA, ProgressiveConfig(start=2, solver="heun"), cfg)
    ),
    "consistency": lambda cfg: distill_consistency(teacher(), DATA, ConsistencyConfig(num_steps=3), cfg),
    "MeanFlow": meanflow,
    "GDD": adversarial,
    "GDD-I": lambda cfg: adversarial(cfg, frozen=True),
    "hybrid": lambda cfg: refine(get(), critic(), Pairs(), DATA, cfg, GanConfig(n_iter=2), TWICE, 0.5),
}
ENGINE = [
    dict(accumulate=2),
    dict(clip=1.0, schedule="cosine", warmup=2),
    dict(ema_more=(10.0, 100.0), weight_decay=0.1),
    dict(precision="bf16"),
    dict(precision="fp16"),
]


@pytest.fixture
def gpu():
    with FakeGPU() as g, without_backward():
        yield g


@pytest.fixture
def settled(gpu, monkeypatch):
    "Steps of each reading of the losses. Inside the loop nothing may wait; what is read there has no values."
    seen, loop = [], training._loop

    def settle(run, pending):
        assert all(v.device.type == "cuda" for _, losses, norms in pending for v in (*losses.values(), *norms))
        seen.append(len(pending))
        pending.clear()

    def without_waiting(*args):
        with gpu.no_wait():
            loop(*args)

    monkeypatch.setattr(training, "_settle", settle)
    monkeypatch.setattr(training, "_loop", without_waiting)
    return seen


def config(**change):
    return TrainConfig(**dict(steps=3, batch_size=4, log_every=2) | change)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_steps_do_not_wait_between_logging_points(settled, name):
    METHODS[name](config(steps=2, precision="bf16", clip=1.0))
    assert settled == [2]


@pytest.mark.parametrize("change", ENGINE, ids=str)
def test_the_engine_does_not_wait_between_logging_points(settled, change):
    METHODS["GET"](config(**change))
    assert settled == [2, 1]


def _on_the_cpu(ema, model, decay):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.lerp_(b.cpu().to(a), 1 - decay)


def _checked(descend):
    def f(*args):
        found = descend(*args)
        assert all(v.isfinite() for v in found.values())
        return found

    return f


PLANTED = {  # what it is put in the place of, and what makes it wait
    "average kept on the CPU": ("get_nb.lab.train.ema_update", _on_the_cpu),
    "each loss looked at": ("get_nb.lab.train.descend", _checked(training.descend)),
    "clipping that asks": (
        "torch.nn.utils.clip_grad_norm_",
        partial(torch.nn.utils.clip_grad_norm_, error_if_nonfinite=True),
    ),
    "optimizer that fp16 must ask": ("get_nb.lab.train.make_optimizer", partial(training.make_optimizer, fused=False)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wait_planted_in_the_engine_is_noticed(settled, monkeypatch, name):
    monkeypatch.setattr(*PLANTED[name])
    with pytest.raises(SAID):
        METHODS["GET"](config(precision="fp16", clip=1.0))


LOSSES = {  # in the loss's place
    "value of the loss": lambda *args: edm_loss(*args) * (1 if edm_loss(*args).item() else 2),
    "tensor left on the CPU": lambda net, x, *rest: edm_loss(net, x, *rest) + torch.zeros(4).to(x.device).mean(),
    "choice by value": lambda net, x, *rest: edm_loss(net, x if x.max() < 2 else x / 2, *rest),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_wait_planted_in_a_loss_is_noticed(settled, name):
    with pytest.raises(SAID):
        teach(config(), LOSSES[name])


def vgg16_of_zeros():
    "VGG16 as it is read from its file, on the CPU."
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features")}
    return load_vgg16({k: torch.zeros(shape) for k, shape in shapes.items()})


def inception():
    "torch-fidelity's Inception, its file of weights left out."
    with mock.patch.object(inceptionv3, "load_state_dict_from_url"), torch.device("cuda"):
        with mock.patch.object(inceptionv3.FeatureExtractorInceptionV3, "load_state_dict"):
            return inceptionv3.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])


def small_classifier(folder):
    "A classifier through the reader of its file."
    path = folder / "classifier.safetensors"
    save_checkpoint(path, create_classifier(width=4, **SHAPE))
    return load_features(path).extractor


WEIGHTS = [torch.full((1, c, 1, 1), 1 / 3) for c in (3, *VGG_CHANNELS)]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_critic_on_pretrained_backbones_does_not_wait(gpu, name):
    with torch.device("cuda"):
        pyramid = load_backbone(name, resolution=32)
    D = Discriminator([pyramid], torch.zeros(1, 3, 8, 8, device="cuda"), DiscriminatorConfig(dim=4, width=4)).to("cuda")
    assert not left_behind(D) + left_behind(D.projections[0])
    with gpu.no_wait():
        (logits,) = D(torch.zeros(2, 3, 8, 8, device="cuda"))
    assert logits.device.type == "cuda" and logits.shape == (4, 2)


@pytest.mark.parametrize(
    "name, make, weights", [("lpips", make_lpips, WEIGHTS[1:]), ("dists", make_dists, 2 * WEIGHTS)]
)
def test_perceptual_losses_wait_at_their_first_call_alone(gpu, name, make, weights):
    net, images = vgg16_of_zeros(), [torch.zeros(1, 1, 8, 8, device="cuda") for _ in range(2)]
    distance = make(net, weights)
    distance(*images)
    assert not left_behind(net)
    with gpu.no_wait():
        assert distance(*images).device.type == "cuda"


@pytest.mark.parametrize("kind", ["classifier", "inception"])
def test_features_wait_for_what_they_return_alone(gpu, monkeypatch, tmp_path, kind):
    extractor = inception() if kind == "inception" else small_classifier(tmp_path)
    network = FeatureNetwork(extractor, kind, 2, "cuda")
    shape = (3, 3, 32, 32) if kind == "inception" else (3, 1, 8, 8)
    assert not left_behind(network.extractor)
    with gpu.no_wait():
        made = network.extractor(torch.zeros(shape, dtype=torch.uint8, device="cuda"))
    assert all(v.device.type == "cuda" for v in made)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda t, **kw: t.pin_memory().to("cuda", **kw))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: read.append(t) or torch.zeros(t.shape, dtype=t.dtype))
    read = []
    with gpu.no_wait():
        found = network(torch.zeros(shape, dtype=torch.uint8))
    assert len(read) == 4  # two batches, two layers
    assert all(len(v) == 3 and v.device.type == "cpu" for v in found.values())
