"""Memory of a training step at the paper's sizes: what the price says against what tensors of shapes count on a GPU that is not there."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch._subclasses import FakeTensorMode

from get_nb.distillation import DistillConfig, distill_loss
from get_nb.lab.checkpoints import create_model
from get_nb.lab.costs import stage_cost
from get_nb.lab.counting import count_parameters, kept_bytes
from get_nb.lab.fast import Fast
from get_nb.lab.price import predicted_bytes, predicted_memory
from get_nb.lab.profiles import load_profile

IMAGES = 128


def counted(name, precision, images):
    "Parameters, and bytes of weights, gradient, moments, average and of what the loss keeps, on a fake GPU."
    with FakeTensorMode(), torch.device("cuda"):
        net, noise = create_model(name), torch.empty(images, 3, 32, 32)
        run = Fast(net, precision) if precision else net
        kept = kept_bytes(lambda: distill_loss(run, noise, None, noise, DistillConfig()), net.parameters())
    return count_parameters(net), 20 * count_parameters(net) + kept


@pytest.mark.parametrize("name", ["GET-M/2", "GET-S/2", "GET-B/2+", "ViT-S/2", "ViT-B/2", "ViT-L/2"])  # others: room 42
def test_the_price_of_a_size_is_within_a_tenth_of_what_is_counted(name):
    parameters, bytes_ = counted(name, "bf16", IMAGES)
    assert abs(predicted_memory(parameters, IMAGES * predicted_bytes(name)) / bytes_ - 1) < 0.1


def paper_stage(name, **change):
    stages = load_profile(ROOT, "paper")
    stage = replace(stages[name], params=stages[name].params | change)
    return 1e9 * stage_cost(stage, stages, "cifar10")["memory_gb"]


@pytest.mark.parametrize(
    "change, precision, images",
    [
        (dict(accumulate=2), "float32", IMAGES // 2),
        (dict(accumulate=4, precision="bf16"), "bf16", IMAGES // 4),
        (dict(batch_size=32, fast=False), "", 32),
    ],
)
def test_the_price_of_a_stage_is_of_its_formulation_precision_and_share_of_the_batch(change, precision, images):
    assert abs(paper_stage("get_B", **change) / counted("GET-B/2", precision, images)[1] - 1) < 0.1


@pytest.mark.parametrize("name", ["GET-digits/2", "ViT-digits/2"])
def test_shapes_keep_what_a_processor_keeps(name):
    def kept(device):
        net = create_model(name, image_size=8, channels=1).to(device)
        noise = torch.zeros(4, 1, 8, 8, device=device)
        return kept_bytes(lambda: distill_loss(net, noise, None, noise, DistillConfig(n_iter=2)), net.parameters())

    assert kept("meta") == kept("cpu")
