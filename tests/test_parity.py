"""The models compute what the released code computes: names, shapes, counts and outputs of the golden cases."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from get_nb.lab.released import load_edm_pickle
from get_nb.lab.core import setup, torch_rng
from get_nb.lab.checkpoints import create_model
from get_nb.sampler import euler_sample, heun_sample
from get_nb.lab.checkpoints import create_teacher

DATA = Path(__file__).parent / "data"
STATE = json.loads((DATA / "reference_state_dicts.json").read_text(encoding="utf-8"))
EDM_STATE = json.loads((DATA / "edm_state_dicts.json").read_text(encoding="utf-8"))
OUT = np.load(DATA / "get_reference_outputs.npz")


def shapes_in(entry):
    return next(v for v in entry.values() if isinstance(v, dict) and "pos_embed" in v)


@pytest.mark.parametrize("name", STATE)
def test_released_transformers_have_these_names_shapes_and_counts(name):
    model_name, conditional = name.split("|")
    with torch.device("meta"):
        model = create_model(model_name, num_classes=10 if conditional == "cond" else 0)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes_in(STATE[name])
    assert sum(p.numel() for p in model.parameters()) == STATE[name]["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == STATE[name]["trainable"]


@pytest.mark.parametrize("name", EDM_STATE)
def test_released_unets_have_these_names_and_shapes(name):
    with torch.device("meta"):
        teacher = create_teacher(name)
    assert {k: list(v.shape) for k, v in teacher.state_dict().items()} == EDM_STATE[name]["state_dict"]
    assert sum(p.numel() for p in teacher.parameters()) == EDM_STATE[name]["params"]


DEVICES = [("cpu", 2e-5)] + (
    [("cuda", 1e-4)] if torch.cuda.is_available() else []
)  # device, bound; TF32 is off by get_nb.lab.core.setup


def golden_model(name, conditional, early):
    model = create_model(name, num_classes=10 if conditional else 0).eval()
    for key, p in model.state_dict().items():
        if key == "pos_embed":
            continue
        a = (
            np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
            .standard_normal(tuple(p.shape))
            .astype(np.float32)
        )
        if key.endswith("bias"):
            a *= np.float32(0.02)
        elif "norm" in key:
            a = 1 + np.float32(0.1) * a
        elif "embedding_table" in key:
            a *= np.float32(0.5)
        else:
            a /= np.sqrt(np.prod(p.shape[1:])).astype(np.float32)
        if early and key.startswith("deq_blocks") and ("attn.proj" in key or "mlp.fc2" in key):
            a *= np.float32(1e-8)
        p.copy_(torch.from_numpy(a))
    return model


@pytest.mark.parametrize("device, bound", DEVICES)
@pytest.mark.parametrize("case", [k for k in OUT.files if "|" in k])
@torch.no_grad()
def test_golden_outputs(case, device, bound):
    device = setup(device)
    name, conditional, what = case.replace("_", "/").split("|")
    model = golden_model(name, conditional == "True", what == "early").to(device)
    noise, labels = torch.from_numpy(OUT["e"]), torch.from_numpy(OUT["y"]).long() if conditional == "True" else None
    z0 = torch.from_numpy(
        np.random.RandomState(99).standard_normal((2, model.tokens, model.cfg.dim)).astype(np.float32)
    )
    noise, labels, z0 = (v if v is None else v.to(device) for v in (noise, labels, z0))
    ours = (torch.stack(model.unrolled(noise, labels, z0)) if what == "train" else model(noise, labels, z0)).cpu()
    reference = torch.from_numpy(OUT[case])
    assert ((ours - reference).abs() <= bound * reference.abs().clamp(min=1)).all()
    if name.startswith("GET") and what != "train":
        stats = model.solve(noise, labels, z0)[1]
        assert stats.n_evals == (1 if what == "early" else 6)
        assert sorted(stats.lowest_step.tolist()) == ([0, 1] if name == "GET-M/2" else [0, 0])


EDM_OUT = np.load(DATA / "edm_reference_outputs.npz")


@pytest.mark.parametrize("device, bound", DEVICES)
@pytest.mark.parametrize("name, labels", [("ddpmpp_cond", [1, 4, 9]), ("ncsnpp_uncond", None)])
@torch.no_grad()
def test_golden_edm_outputs_from_pickles_of_the_released_layout(name, labels, device, bound):
    device = setup(device)
    teacher = load_edm_pickle(DATA / f"edm_{name}.pkl").to(device)
    x, sigma, latents = (torch.from_numpy(EDM_OUT[k]).to(device) for k in ("x", "sigma", "lat"))
    labels = torch.tensor(labels, device=device) if labels else None
    ours = dict(
        D=teacher(x * sigma.view(-1, 1, 1, 1), sigma, labels),
        heun5=heun_sample(teacher, latents, labels, num_steps=5),
        heun18=heun_sample(teacher, latents, labels, num_steps=18),
        euler9=euler_sample(teacher, latents, labels, num_steps=9),
    )
    for key, value in ours.items():
        reference = torch.from_numpy(EDM_OUT[f"{name}|{key}"])
        assert ((value.cpu() - reference).abs() <= bound * reference.abs().clamp(min=1)).all(), key


@pytest.mark.parametrize("wrong", [torch.tensor([0, 1, 2, 10]), torch.zeros(3, dtype=torch.int64), torch.zeros(4)])
def test_a_teacher_refuses_labels_that_it_cannot_use(wrong):
    teacher = create_teacher("unet-digits", num_classes=10, image_size=8, channels=1)
    with pytest.raises(ValueError, match="labels must"):
        teacher(torch.zeros(4, 1, 8, 8), 2.0, wrong)
    plain = create_teacher("unet-digits", image_size=8, channels=1)
    with pytest.raises(ValueError, match="unconditional network"):
        plain(torch.zeros(4, 1, 8, 8), 2.0, torch.zeros(4, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet-digits", "edm-cifar10-32x32-cond-ve"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_in_another_type_denoises_and_answers_in_float32(name, dtype):
    size = dict(base=32, mult=(1,), blocks=1, attention=(8,), augment_dim=2)
    teacher = create_teacher(name, num_classes=3, image_size=8, channels=1, **size).eval()
    for p in teacher.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=torch_rng("types")))
    x, labels, augment = torch.randn(2, 1, 8, 8), torch.tensor([0, -1]), torch.ones(2, 2)
    whole, drawn = teacher(x, 1.5, labels, augment), heun_sample(teacher, x, labels, num_steps=3)
    teacher = teacher.to(dtype)
    for given in (x, x.to(dtype), x.double()):
        other = teacher(given, 1.5, labels, augment)
        assert other.dtype == torch.float32 and (other - whole).norm() < 0.05 * whole.norm()
    again = heun_sample(teacher, x.to(dtype), labels, num_steps=3)
    assert again.dtype == torch.float64 and (again - drawn).norm() < 0.1 * drawn.norm()
