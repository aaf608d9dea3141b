"Losses that are captured and replayed: what a replay gives is what the loss gives, with a stand-in where there is no GPU."

import functools

import pytest
import torch

from get_nb import create_model
from get_nb.discriminator import Discriminator, DiscriminatorConfig
from get_nb.distillation import DistillConfig, distill_loss
from get_nb.gdd import Gan, GanBatch, GanConfig
from get_nb.kd import OneStep
from get_nb.lab import capture as engine
from get_nb.lab.core import autocast, seed_everything
from get_nb.lab.fast import Fast
from get_nb.lab.schedule import TrainConfig
from get_nb.lab.capture import Graphs
from get_nb.lab.train import train
from get_nb.teachers import build_teacher

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def overwrite(old, new):
    "Put new numbers where a capture left its results, as a replay does."
    if isinstance(old, torch.Tensor):
        old.copy_(new)
    elif isinstance(old, dict):
        for k in old:
            overwrite(old[k], new[k])
    elif old is not None:
        for a, b in zip(old, new):
            overwrite(a, b)


@pytest.fixture
def graphs(monkeypatch):
    "Graphs; without a GPU, a replay computes again and writes to the same place. -> how often was something captured?"
    captured = []

    def record(work):
        result = work()
        result = (result[0], tuple(None if d is None else d.clone() for d in result[1]))
        captured.append(work)
        return result, lambda: overwrite(result, work())

    if not GPU:
        monkeypatch.setattr(engine, "_recorded", record)
        monkeypatch.setattr(Graphs, "device", "cpu")
    return captured


def small_get(**kw):
    seed_everything(0, "graphs")
    net = create_model("GET-digits/2", image_size=8, channels=1, dim=16, heads=2, **kw).to(DEVICE)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    return net


def gradients(net, run, *inputs, **kw):
    "The loss, and a copy of the gradients."
    net.zero_grad()
    found = run(*inputs, **kw)
    value = engine._loss_of(found)
    value.backward()
    return value.item(), [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5) and len(a[1]) == len(b[1])
    for p, q in zip(a[1], b[1]):
        assert (p is None or not p.any()) if q is None else torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("shape", ["scalar", "dict", "tuple"])
def test_a_replay_gives_the_loss_and_the_gradients_of_new_inputs(graphs, shape, precision):
    net, cfg = small_get(), DistillConfig(n_iter=3)
    replay = Graphs(net)

    def loss(noise, labels, image):
        d = distill_loss(net, noise, labels, image, cfg)
        return dict(scalar=d, dict=dict(loss=d, twice=2 * d), tuple=(d, [noise.mean(), 2 * d]))[shape]

    for k in range(3):
        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(k)).to(DEVICE)
        inputs = noise, None, noise.clamp(-1, 1)
        with autocast(precision, DEVICE):
            plain = gradients(net, loss, *inputs)
            found = replay(loss, *inputs, key=3)
            same(gradients(net, replay, loss, *inputs, key=3), plain)
        if shape == "dict":
            assert found["twice"].item() == pytest.approx(2 * plain[0], rel=1e-5) and not found["twice"].requires_grad
        if shape == "tuple":
            assert found[1][0].item() == pytest.approx(noise.mean().item(), abs=1e-6)
        with torch.no_grad():  # weights move in place, as an optimizer moves them
            for p in net.parameters():
                p.mul_(0.99)
    assert replay.works and len(replay.captured) == 1


def test_each_key_and_each_shape_has_a_graph_of_its_own(graphs):
    net = small_get()
    replay = Graphs(net)
    x = torch.randn(4, 1, 8, 8, device=DEVICE)

    def loss(noise, image, n):
        return distill_loss(net, noise, None, image, DistillConfig(n_iter=n))

    for n, batch in ((2, 4), (3, 4), (2, 2), (2, 4)):
        inputs = x[:batch], x[:batch]
        replayed = gradients(net, replay, functools.partial(loss, n=n), *inputs, key=n)
        same(replayed, gradients(net, loss, *inputs, n))
    assert len(replay.captured) == 3


def test_no_graph_without_gradients_or_with_another_mode(graphs):
    net, x = small_get(), torch.randn(2, 1, 8, 8, device=DEVICE)

    def loss(noise):
        return distill_loss(net, noise, None, noise, DistillConfig(n_iter=2))

    replay = Graphs(net)
    with torch.no_grad():
        replay(loss, x)
    other = Graphs(net, "")
    other(loss, x)
    assert not replay.captured and not other.captured


def test_a_loss_that_cannot_be_captured_runs_as_it_is(graphs, monkeypatch, capsys):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(engine, "_recorded", refuse)
    net, x = small_get(), torch.randn(2, 1, 8, 8, device=DEVICE)
    replay = Graphs(net)

    def loss(noise):
        return distill_loss(net, noise, None, noise, DistillConfig(n_iter=2))

    same(gradients(net, replay, loss, x), gradients(net, loss, x))
    said = capsys.readouterr().out
    assert said.count("no CUDA graph of the loss") == 1 and "stream is capturing" in said and not replay.works


@pytest.mark.parametrize("fast", [False, True])
def test_a_training_with_graphs_is_the_training_without(graphs, fast):
    def fit(mode):
        net = small_get()
        run, replay = Fast(net) if fast else net, Graphs(net, mode)

        def loss(noise, image):
            return distill_loss(run, noise, None, image, DistillConfig(n_iter=2))

        def loss_fn(model, step, share):
            g = torch.Generator().manual_seed(step)
            noise = torch.randn(8, 1, 8, 8, generator=g)[share].to(DEVICE)
            return replay(loss, noise, noise.clamp(-1, 1))

        cfg = TrainConfig(steps=6, batch_size=8, lr=1e-3, clip=1.0, log_every=2, compile=mode)
        ema, history = train(net, loss_fn, cfg)
        return history["loss"], [p.detach().cpu() for p in ema.parameters()]

    found = [fit(mode) for mode in ("", "graph")]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(found[0][1], found[1][1]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert len(graphs) == (0 if GPU else 1)


class Pixels(torch.nn.Module):
    "A backbone that shows its critic the pixels."

    def forward(self, x):
        return [x]


def gan(mode):
    "A small GDD, its critic's power iteration at rest."
    seed_everything(0, "graphs")
    generator = OneStep(build_teacher("unet-digits", num_classes=0, image_size=8, channels=1)).to(DEVICE)
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x = torch.randn(2, 1, 8, 8, device=DEVICE)
    critic = Discriminator([Pixels()], x[:1], DiscriminatorConfig(dim=4, width=4), 0).to(DEVICE).eval()
    return Gan(generator, critic, None, 0, TrainConfig(steps=1, batch_size=2, compile=mode), GanConfig())


@pytest.mark.parametrize("which", ["generator", "critic", "R1"])
def test_the_losses_of_gdd_are_replayed_too(graphs, which):
    def slopes(mode):
        method = gan(mode)
        G, D = method.networks["g"], method.networks["d"]
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        batch = GanBatch(noise, None, noise.flip(0), None)
        share = slice(0, 2)
        D.requires_grad_(False)
        made = gradients(G, lambda: method.generator_terms(batch, 0, share))
        D.requires_grad_(True)
        terms = dict(critic=lambda: method.critic_terms(batch, share), R1=lambda: method.r1_terms(batch, share))
        asked = made if which == "generator" else gradients(D, terms[which])
        assert torch.isfinite(batch.fakes[0]).all()
        assert which != "critic" or batch.on_real[0][0].shape[-1] == 2
        return asked

    found = [slopes(mode) for mode in ("", "graph")]
    assert found[0][0] != 0
    same(found[1], found[0])


def test_shares_of_a_batch_do_not_overwrite_each_other(graphs):
    method = gan("graph")
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    batch, plain = (GanBatch(noise, None, noise.flip(0), None) for _ in range(2))
    for share in (slice(0, 2), slice(2, 4)):
        for terms in (lambda s: method.generator_terms(batch, 0, s), lambda s: method.critic_terms(batch, s)):
            terms(share)
        with torch.no_grad():  # as it is without a graph
            method.generator_terms(plain, 0, share)
            method.critic_terms(plain, share)
    for start in (0, 2):
        assert torch.allclose(batch.fakes[start], plain.fakes[start], atol=1e-5)
        assert torch.allclose(batch.on_real[start][0], plain.on_real[start][0], atol=1e-5)


def leaves_of(node, seen):
    "The tensors to which a graph of autograd leads back."
    if node is None or node in seen:
        return []
    seen.add(node)
    own = [node.variable] if hasattr(node, "variable") else []
    return own + [v for after, _ in node.next_functions for v in leaves_of(after, seen)]


def test_no_node_of_the_weights_themselves_takes_part_in_a_recording(graphs, monkeypatch):
    net, x, found = small_get(), torch.randn(2, 1, 8, 8, device=DEVICE), []

    def loss(noise):
        return distill_loss(net, noise, None, noise, DistillConfig(n_iter=2))

    alive = loss(x)  # its nodes belong to the stream outside, and would break a recording that met them
    slope = torch.autograd.grad

    def spy(value, weights, **options):
        found.append(leaves_of(value.grad_fn, set()))
        return slope(value, weights, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    replay = Graphs(net)
    replay(loss, x)
    assert alive.requires_grad and replay.works and found and found[0]
    places = {p.data_ptr() for p in net.parameters()}
    assert not [v for v in found[0] if any(v is p for p in net.parameters())]
    assert {v.data_ptr() for v in found[0]} <= places  # twins: other tensors in the same memory
