"""Wrong input is refused in one line where it enters, and refusing it costs nothing where a model computes."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from get_nb import create_model, create_teacher, equilibrium, euler_sample, heun_sample, solve, unroll, unroll_constant
from get_nb.fixed_point import or_nan
from get_nb.get import GET, GETConfig
from get_nb.lab.core import ConfigError
from get_nb.lab.fast import Fast
from get_nb.precond import IdealDenoiser
from get_nb.presets import with_options


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
        (torch.tensor([0.0, 1.0]), r"labels must be int64 of shape \(2,\), not float32 \(2,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), "labels must be int64"),
        (torch.tensor([0]), r"not int64 \(1,\)"),
        (torch.tensor([[0], [1]]), r"not int64 \(2, 1\)"),
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


GOOD = torch.Size((2, 1, 8, 8))
WRONG_NOISE = {
    "9x9": torch.zeros(2, 1, 9, 9),
    "4x16, as many pixels": torch.zeros(2, 1, 4, 16),
    "channels": torch.zeros(2, 3, 8, 8),
    "no batch": torch.zeros(1, 8, 8),
    "an empty batch": torch.zeros(0, 1, 8, 8),
    "bytes": torch.zeros(GOOD, dtype=torch.uint8),
    "whole numbers": torch.zeros(GOOD, dtype=torch.int64),
    "numpy": torch.zeros(GOOD).numpy(),
    "another device": torch.zeros(GOOD, device="meta"),
}


def ways(kind, noise, model):
    "Every way to hand noise to a model."
    if kind == "teacher":
        return [lambda: heun_sample(model, noise, num_steps=2), lambda: euler_sample(model, noise, num_steps=2)]
    return [lambda: model(noise), lambda: model.unrolled(noise, n_iter=2), lambda: Fast(model)(noise)]


@pytest.mark.parametrize("kind", ["teacher", "get", "released get", "vit"])
@pytest.mark.parametrize("wrong", WRONG_NOISE)
def test_noise_that_does_not_fit_a_model_is_refused_in_one_line(kind, wrong):
    if kind == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1), 0, 8, 1)
        calls = ways(kind, WRONG_NOISE[wrong], model)[:2]
    else:
        calls = ways(kind, WRONG_NOISE[wrong], models(0)[kind])
    for run in calls:
        with pytest.raises(ConfigError, match="noise must be|^x must be|takes floating") as e:
            run()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["get", "vit"])
def test_noise_of_another_precision_is_refused_unless_autocast_converts_it(kind):
    model = models(0)[kind]
    with pytest.raises(ConfigError, match=r"noise must be float32 \(B, 1, 8, 8\) on cpu, not float64 \(2, 1, 8, 8\)"):
        model(torch.zeros(GOOD, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(GOOD, dtype=torch.bfloat16)).shape == GOOD
    assert model.double()(torch.zeros(GOOD, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["get", "released get", "fast"])
def test_a_start_that_does_not_fit_is_refused_and_one_that_fits_is_used(name):
    model = models(0)["get"]
    if name == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1, n_iter=1), 0, 8, 1)
        torch.nn.init.normal_(model.final_layer.linear.weight)
    runs = [model, model.unrolled] if name != "fast" else [Fast(model), Fast(model).unrolled]
    noise, z0 = torch.randn(GOOD), torch.randn(2, 16, 16)
    wrong = [z0[0], z0[:1], z0[:, :8], z0[..., :8], z0.long(), z0.double(), z0.numpy(), z0.to("meta")]
    for run in runs:
        for bad in wrong:
            with pytest.raises(ConfigError, match=r"z0 must be float32 \(2, 16, 16\) on cpu, not "):
                run(noise, None, bad)
        one, other = (run(noise, None, z, n_iter=1) for z in (z0, 2 * z0))
        assert not torch.equal(torch.as_tensor(one[0]), torch.as_tensor(other[0]))


@pytest.mark.parametrize("kind", ["get", "released get", "fast"])
@pytest.mark.parametrize("n", [0, -1, 2.0, True, "6"])
def test_iterations_are_a_whole_number_above_zero(kind, n):
    model = models(0)["get"]
    if kind == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1), 0, 8, 1)
    noise = torch.zeros(GOOD)
    for run in (model, model.unrolled) if kind != "fast" else (Fast(model), Fast(model).unrolled):
        with pytest.raises(ConfigError, match="n_iter = "):
            run(noise, n_iter=n)
        run(noise, n_iter=np.int64(1))


@pytest.mark.parametrize("kind", ["get", "released get", "fast"])
def test_a_model_whose_map_gives_no_number_makes_no_image_that_looks_like_one(kind):
    model = models(0)["get"]
    if kind == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1), 0, 8, 1)
    if kind == "fast":
        model = with_options(model, select="lowest")
    with torch.no_grad():
        model.deq_blocks[0].mlp.fc2.weight[0, 0] = torch.nan
    assert (model if kind != "fast" else Fast(model))(torch.randn(GOOD)).isnan().all()


def test_sizes_that_a_model_cannot_have_are_refused():
    for size in (9, 0, 1):
        with pytest.raises(ConfigError, match="image_size"):
            create_model("GET-digits/2", image_size=size, channels=1)
        with pytest.raises(ConfigError, match="image_size"):
            GET(GETConfig(dim=16, heads=2, depth=1), 0, size, 1)
    for shape in (dict(channels=0), dict(num_classes=-1), dict(image_size=8.0), dict(num_classes=2.5)):
        for make in (create_model, create_teacher):
            with pytest.raises(ConfigError, match=next(iter(shape))):
                make("GET-digits/2" if make is create_model else "unet-digits", **dict(dict(image_size=8), **shape))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf"), torch.ones(3), torch.tensor([1.0, 0.0])])
def test_noise_levels_that_a_denoiser_cannot_take_are_refused(sigma):
    for denoiser in (models(0)["teacher"], IdealDenoiser(torch.rand(5, 1, 8, 8))):
        with pytest.raises(ConfigError, match="sigma must be"):
            denoiser(torch.randn(GOOD), sigma)
        one = denoiser(torch.ones(GOOD), 0.5)
        for same in (torch.tensor(0.5), torch.full((2,), 0.5), torch.full((1,), 0.5), np.float64(0.5)):
            assert torch.equal(denoiser(torch.ones(GOOD), same), one)


@pytest.mark.parametrize(
    "how",
    [
        dict(num_steps=0),
        dict(num_steps=2.5),
        dict(sigma_min=0.0),
        dict(sigma_min=80.0),
        dict(sigma_min=float("nan")),
        dict(sigma_max=float("inf")),
        dict(rho=0),
        dict(rho=-7.0),
        dict(rho=float("nan")),
    ],
)
def test_noise_schedules_that_mean_nothing_are_refused(how):
    for sample in (heun_sample, euler_sample):
        with pytest.raises(ConfigError, match=next(iter(how)).split("_")[0]):
            sample(models(0)["teacher"], torch.zeros(GOOD), **how)


Z0 = torch.randn(3, 5)
WRONG_MAPS = {
    "another shape": lambda z: z[:, :4],
    "another batch": lambda z: z[:2],
    "a mean over the batch": lambda z: z.mean(0, keepdim=True),
    "whole numbers": lambda z: z.long(),
    "another device": lambda z: z.to("meta"),
    "nothing": lambda z: None,
    "numpy": lambda z: z.detach().numpy(),
    "a tuple": lambda z: (z, z),
}


def solver_calls(f, z0):
    "Every function of the library that evaluates a map."
    yield from (lambda s=s: solve(f, z0, s, max_iter=3) for s in ("fixed_point", "anderson", "broyden"))
    yield lambda: unroll(f, z0, 2)
    yield lambda: unroll_constant(f, z0, 3, tensors=())
    yield from (lambda g=g: equilibrium(f, z0, g, max_iter=3) for g in ("implicit", "phantom"))


@pytest.mark.parametrize("wrong", WRONG_MAPS)
def test_a_map_that_does_not_return_a_state_is_refused_in_one_line(wrong):
    for run in solver_calls(WRONG_MAPS[wrong], Z0.clone()):
        with pytest.raises(ConfigError, match="f must return a state like the one it is given, float32") as e:
            run()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "z0", [torch.tensor(1.0), torch.ones(3, 5, dtype=torch.int64), np.ones((3, 5)), (Z0, Z0), None]
)
def test_a_start_that_is_no_batch_of_states_is_refused_in_one_line(z0):
    for run in solver_calls(lambda z: z / 2, z0):
        with pytest.raises(ConfigError, match="z0 must be a floating-point tensor"):
            run()
    with pytest.raises(ConfigError, match=r"not float32 \(3,\) on cpu"):  # a residual needs a state per image
        solve(lambda z: z / 2, torch.ones(3), max_iter=3)


@pytest.mark.parametrize(
    "said, how",
    [
        *((f"max_iter = {n!r}: a whole", dict(max_iter=n)) for n in (0, -3, 2.0, True, None)),
        *((f"tol = {t!r}: None or", dict(tol=t)) for t in (-1e-3, float("nan"), "1e-3")),
        ("did you mean 'max_iter'", dict(max_itr=3)),
        ("did you mean 'select'", dict(selct="last")),
        ("did you mean 'lowest'", dict(select="lowst")),
        ("did you mean 'rel'", dict(stop_mode="rell")),
        ("did you mean 'anderson'", dict(solver="andersen")),
        ("tau = ", dict(tau=0)),
        ("tau = ", dict(tau="1")),
    ],
)
def test_solver_options_that_mean_nothing_are_refused_in_one_line(said, how):
    with pytest.raises(ConfigError, match=said):
        solve(lambda z: z / 2, Z0, **(dict(max_iter=3) | how))
    with pytest.raises(ConfigError, match=said):
        equilibrium(lambda z: z / 2, Z0, **(dict(max_iter=3) | how))
    with pytest.raises(ConfigError, match=said):  # at once, not in the backward pass
        equilibrium(lambda z: z / 2, Z0, max_iter=3, adjoint=how)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_a_map_that_gives_nan_is_reported_by_the_solver(solver):
    def f(z):
        z = z / 2
        return torch.where(torch.arange(3)[:, None] == 1, torch.nan, z)

    z, stats = solve(f, Z0, solver, max_iter=20, tol=1e-5, stop_mode="abs")
    assert stats.failed.tolist() == [False, True, False] and stats.converged.tolist() == [True, False, True]
    assert stats.abs_lowest.isinf().tolist() == [False, True, False] and z[[0, 2]].abs().max() < 1e-4
    shown = or_nan(z, stats)
    assert shown[1].isnan().all() and torch.equal(shown[[0, 2]], z[[0, 2]])
