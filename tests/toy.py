"""A small training, GAN, set of pairs and student, for tests that need several processes: python -m toy train|gan|pairs|student FOLDER [name=value ...]."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from get_nb.lab.core import seed_everything, torch_rng
from get_nb.discriminator import ClassifierPyramid, Discriminator, DiscriminatorConfig
from get_nb.gdd import GDD, GanConfig, train_gan
from get_nb.kd import OneStep
from get_nb.lab.data import load_data
from get_nb.lab.classifier import create_classifier
from get_nb.teachers import build_teacher
from get_nb.distillation import DistillConfig, distill
from get_nb.lab.checkpoints import create_model
from get_nb.lab.evaluate import training_formulation
from get_nb.lab.generation import generate_pairs
from get_nb.lab.store import PairDataset, save_pairs
from get_nb.pairs import PairsConfig
from get_nb.lab.schedule import TrainConfig, batch_indices
from get_nb.lab.train import train

os.environ.setdefault("GET_NB_PROGRESS", "off")
CONFIG = dict(
    steps=50, batch_size=32, lr=3e-3, clip=1.0, schedule="linear", ema_half_life=300, checkpoint_every=10, log_every=1
)
RECIPE = dict(n=120, num_classes=10, shape=(1, 8, 8), num_steps=3, shard_size=10, batch_size=5, teacher="toy")


def fit(folder, pause=0.0, die=-1, poison=-1, watch=None, **change):
    "Fit a small network to noisy sines; -> ema, history."
    seed_everything(0, "init")
    cfg = TrainConfig(**CONFIG | change)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))

    def loss_fn(model, step, share):
        x = torch.randn((1000, 8), generator=torch_rng("x"))[batch_indices(1000, cfg.batch_size, step, cfg.seed)][share]
        noise = torch.randn((cfg.batch_size, 1), generator=torch_rng("noise", step))[share]
        time.sleep(pause)
        if step == die and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), 9)
        return ((model(x) - x.sum(1, keepdim=True).sin() + 0.1 * noise) ** 2).mean() * (
            float("nan") if step == poison else 1
        )

    return train(model, loss_fn, cfg, folder, desc="toy", watch=watch)


def gan(folder, pause=0.0, poison=-1, at=None, **change):
    "Train a small one-step generator against a small critic; `at`: step -> called before it; -> ema, history."
    shape, data = dict(num_classes=10, image_size=8, channels=1), load_data("digits")
    seed_everything(0, "gan")
    generator = OneStep(build_teacher("unet-digits", base=8, **shape))
    pyramid = ClassifierPyramid(create_classifier(width=4, **shape))
    critic = Discriminator([pyramid], data.batch([0])[0], DiscriminatorConfig(dim=8, width=8), 10)
    cfg = replace(GDD, **dict(steps=12, batch_size=9, lr=1e-4, checkpoint_every=4, log_every=1) | change)
    settings = GanConfig(lr_critic=1e-4, r1_every=3, monitor_every=3)

    def real(step):
        time.sleep(pause)
        if at and step in at:
            at[step]()
        return data.batch(batch_indices(len(data), cfg.batch_size, step, cfg.seed))

    def extra(model, step, share):
        return torch.tensor(float("nan") if step == poison else 0.0)

    def monitor(ema):
        return next(ema.parameters()).norm()

    return train_gan(generator, critic, real, 10, cfg, settings, extra, monitor, state_dir=folder)


class Denoiser(torch.nn.Module):
    "A small conditional denoiser with fixed weights."

    def __init__(self, pause=0.0):
        super().__init__()
        seed_everything(0, "denoiser")
        self.conv, self.pause = torch.nn.Conv2d(1, 1, 3, padding=1), pause

    def forward(self, x, sigma, labels=None):
        time.sleep(self.pause)
        sigma = sigma.reshape(-1, 1, 1, 1)
        return (self.conv(x) + labels.view(-1, 1, 1, 1) / 10) / (1 + sigma**2)


def make(folder, pause=0.0, **change):
    "Make the toy pairs; -> the manifest."
    return generate_pairs(Denoiser(pause).eval(), folder, PairsConfig(**RECIPE | change))


def learnable(folder, n=120):
    "Pairs that a student can learn at once: each image is its noise, squashed and shifted by its class."
    noise, label = torch.randn((n, 1, 8, 8), generator=torch_rng("learnable")), torch.arange(n) % 10
    image = (noise + (label.view(-1, 1, 1, 1) - 4.5) / 3).tanh()
    save_pairs(folder, noise, image, label, num_classes=10, teacher="learnable")


def student(folder, fast=False, name="GET-digits-30/2", options=None, **change):
    "Distil the pairs in `folder` into a small student, keeping its state there; -> ema, history."
    seed_everything(0, name)
    model = create_model(name, num_classes=10, image_size=8, channels=1, dim=32, depth=1, **(options or {}))
    cfg = TrainConfig(**CONFIG | dict(lr=1e-3, batch_size=16, checkpoint_every=25) | change)
    what = DistillConfig(n_iter=4)
    formulation = training_formulation(model, what, cfg) if fast else None
    pairs = PairDataset(Path(folder) / "pairs")
    return distill(model, pairs, what, cfg, Path(folder) / "state", formulation=formulation)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    change = {k: json.loads(v) for k, v in (r.split("=", 1) for r in rest)}
    if what == "pairs":
        make(folder, **change)
    elif what == "student":
        student(folder, **change)
    elif what == "gan":
        gan(Path(folder) / "state", **change)
    else:
        fit(Path(folder) / "state", **change)
