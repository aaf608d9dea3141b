"""Pipelines of diffusers: every scheduler class and time embedding is read as what it is, or refused by name."""

import json

import diffusers
import pytest
import torch
from diffusers import schedulers
from safetensors.torch import load_file, save_file

from get_nb.lab.core import ConfigError, seed_everything
from get_nb.lab.diffusers import create_diffusers_teacher, load_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

UNET = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=[16, 16],
    norm_num_groups=4,
    attention_head_dim=8,
    down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"],
)
CLASSES = sorted(n for n in dir(schedulers) if n.endswith("Scheduler"))
READ = {
    f"{n}Scheduler"
    for n in """DDPM DDPMParallel DDIM DDIMInverse DDIMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete
    HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep
    DEISMultistep UniPCMultistep""".split()
}


def teacher_of(scheduler, **unet):
    seed_everything(0)
    return create_diffusers_teacher(unet=UNET | unet, scheduler=scheduler, image_size=8, channels=3).eval()


def image_predicted(kind, x_t, output, a):
    "What the network's output says of the clean image, by the definition of the prediction type."
    if kind == "epsilon":
        return (x_t - (1 - a).sqrt() * output) / a.sqrt()
    return output if kind == "sample" else a.sqrt() * x_t - (1 - a).sqrt() * output


PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("name, prediction", [(n, p) for n in CLASSES for p in PREDICTIONS[: 3 if n in READ else 1]])
@torch.no_grad()
def test_a_scheduler_class_is_read_as_its_own_schedule_or_refused_by_name(name, prediction):
    if name not in READ:
        with pytest.raises(ConfigError, match=name):
            teacher_of(dict(_class_name=name, prediction_type=prediction))
        return
    teacher = teacher_of(dict(_class_name=name, prediction_type=prediction))
    own = getattr(diffusers, name)(prediction_type=prediction)  # the defaults of the class, which differ
    x = torch.randn(2, 3, 8, 8)
    for t in (1, 300, 900):
        a = own.alphas_cumprod[t].float()
        sigma = ((1 - a) / a).sqrt()
        x_t = x * a.sqrt()
        expected = image_predicted(prediction, x_t, teacher.model(x_t, t).sample, a)
        assert (teacher(x, sigma) - expected).abs().max() <= 2e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", [None, "ddpm", "MySchedulerOfTomorrow", 5])
def test_an_unknown_scheduler_is_named(name):
    with pytest.raises(ConfigError, match=f"_class_name is {name!r}"):
        teacher_of(dict(_class_name=name))


@pytest.mark.parametrize(
    "culprit, scheduler, unet",
    [
        ("flow_prediction", dict(_class_name="DPMSolverMultistepScheduler", prediction_type="flow_prediction"), {}),
        ("use_flow_sigmas", dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), {}),
        ("timestep_type", dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"), {}),
        ("time_embedding_type", dict(_class_name="DDPMScheduler"), dict(time_embedding_type="fourier")),
        ("time_embedding_type", dict(_class_name="DDPMScheduler"), dict(time_embedding_type="learned")),
        ("variance_type", dict(_class_name="DDPMScheduler", variance_type="learned_range"), {}),
        ("6 channels of 3", dict(_class_name="DDPMScheduler"), dict(out_channels=6)),
        ("pure noise", dict(_class_name="DDPMScheduler", rescale_betas_zero_snr=True), {}),
    ],
)
def test_a_network_that_is_asked_for_something_else_is_refused_by_name(culprit, scheduler, unet):
    with pytest.raises(ConfigError, match=culprit) as e:
        teacher_of(scheduler, **unet)
    assert "\n" not in str(e.value)


@pytest.fixture
def pipe(tmp_path):
    seed_everything(0)
    net, schedule = diffusers.UNet2DModel(**UNET), diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(unet=net, scheduler=schedule).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe", net.eval()


@torch.no_grad()
def test_attention_under_its_older_names_is_the_same_network(pipe):
    folder, net = pipe
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = load_file(path)
    for new, old in names.items():
        older = {k.replace(f".{new}.", f".{old}."): v for k, v in older.items()}
    assert any(".query." in k for k in older) and not any(".to_q." in k for k in older)
    save_file(older, path)
    x, t = torch.randn(2, 3, 8, 8), 500
    teacher = load_diffusers(folder)
    assert torch.equal(teacher.model(x, t).sample, net(x, t).sample)


def test_the_scheduler_that_the_pipeline_names_counts(pipe):
    folder, _ = pipe
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "CMStochasticIterativeScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ConfigError, match="CMStochasticIterativeScheduler"):
        load_diffusers(folder)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_in_another_type_denoises_and_answers_in_float32(dtype):
    teacher = teacher_of(dict(_class_name="DDPMScheduler"))
    x = torch.randn(2, 3, 8, 8)
    whole = teacher(x, 1.5)
    other = teacher.to(dtype)(x.to(dtype), 1.5)
    assert other.dtype == torch.float32 and (other - whole).norm() < 0.05 * whole.norm()
