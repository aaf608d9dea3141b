"""Wrong input is refused in one line where it enters, and refusing it costs nothing where a model computes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from get_nb import create_model, create_teacher
from get_nb.lab.core import ConfigError


def models(num_classes):
    "A teacher, a GET and a ViT of 8x8 images, with weights that make a difference, and what each is called with."
    torch.manual_seed(0)
    shape = dict(num_classes=num_classes, image_size=8, channels=1)
    teacher = create_teacher("unet-digits", base=16, **shape)
    small = dict(dim=16, heads=2, depth=1, **shape)
    out = dict(teacher=teacher, get=create_model("GET-digits/2", **small), vit=create_model("ViT-digits/2", **small))
    for m in out.values():
        for p in m.parameters():
            if p.requires_grad and p.abs().max() < 1e-3:  # fresh weights that are zero, or next to it
                torch.nn.init.normal_(p, std=0.1)
    return {k: m.eval() for k, m in out.items()}


def call(model, noise, labels):
    return model(noise, 1.0, labels) if hasattr(model, "sigma_data") else model(noise, labels)


@pytest.mark.parametrize("kind", ["teacher", "get", "vit"])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_labels_on_a_gpu_are_not_waited_for(kind, num_classes):
    model, labels = models(num_classes)[kind], None
    kinds = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    with FakeTensorMode():  # has no values: whatever looks at one raises
        state = {k: torch.empty(shape, dtype=dtype, device="cuda") for k, (shape, dtype) in kinds.items()}
        if num_classes:
            labels = torch.zeros(2, dtype=torch.int64, device="cuda")
        noise = torch.zeros(2, 1, 8, 8, device="cuda")
        given = (noise, torch.ones((), device="cuda"), labels) if kind == "teacher" else (noise, labels)
        out = torch.func.functional_call(model, state, given)
    assert out.shape == (2, 1, 8, 8) and out.device.type == "cuda"


@pytest.mark.parametrize("kind", ["teacher", "get", "vit"])
def test_a_conditional_model_compiles_in_one_graph_with_the_same_result(kind):
    model = models(10)[kind]
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = call(compiled, noise, labels) if kind != "teacher" else compiled(noise, torch.tensor(1.0), labels)
        assert torch.allclose(got, call(model, noise, labels), atol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "get", "vit"])
def test_labels_that_a_model_cannot_take_are_refused_in_one_line(kind):
    noise = torch.zeros(2, 1, 8, 8)
    first = -1 if kind == "teacher" else 0
    for labels, said in [
        (torch.tensor([0, 10]), f"labels must lie in {first}..9, found 0..10"),
        (torch.tensor([first - 1, 3]), f"labels must lie in {first}..9, found {first - 1}..3"),
        (torch.tensor([0.0, 1.0]), r"labels must be int64 of shape \(2,\), not torch.float32 \(2,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), "labels must be int64"),
        (torch.tensor([0]), r"not torch.int64 \(1,\)"),
        (torch.tensor([[0], [1]]), r"not torch.int64 \(2, 1\)"),
        (torch.eye(10)[:2], "labels must be int64"),
    ]:
        with pytest.raises(ConfigError, match=said):
            call(models(10)[kind], noise, labels)
    with pytest.raises(ConfigError, match="unconditional network"):
        call(models(0)[kind], noise, torch.tensor([0, 1]))


def test_a_teacher_takes_minus_one_as_no_class_and_a_class_as_its_row():
    noise, nothing = torch.randn(3, 1, 8, 8), torch.tensor([-1, -1, -1])
    teacher = models(10)["teacher"]
    with torch.no_grad():
        without = teacher(noise, 1.0)
        assert torch.equal(teacher(noise, 1.0, nothing), without)
        mixed = teacher(noise, 1.0, torch.tensor([-1, 4, -1]))
        assert torch.equal(mixed[[0, 2]], without[[0, 2]]) and not torch.equal(mixed[1], without[1])
        assert torch.equal(models(0)["teacher"](noise, 1.0, nothing), models(0)["teacher"](noise, 1.0))
