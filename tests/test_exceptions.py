"""What cannot be built or measured is refused by us, in one line that names the culprit; no library's exception comes through."""

import inspect
import itertools

import pytest
import torch

import get_nb
import released
from get_nb.lab.core import ConfigError, FileError
from get_nb.lab.checkpoints import create_model, create_teacher
from get_nb.lab.metrics import _FEWEST as FEWEST
from get_nb.lab.classifier import create_classifier
from get_nb.lab.files import save_checkpoint
from get_nb.lab.metrics import compare, load_features
from get_nb.pairs import PairsConfig


def built(make, *args, **kw):
    "What was built, or None after a refusal of one line by us."
    try:
        return make(*args, **kw)
    except ConfigError as e:
        assert "\n" not in str(e) and len(str(e)) < 250
        return None


DIMS = (1, 2, 4, 6, 8, 12, 24, 33, 64, 66)


@pytest.mark.parametrize("name", ["GET-digits/2", "ViT-digits/2"])
@torch.no_grad()
def test_a_width_that_cannot_be_split_is_refused_when_built_not_when_called(name):
    made = set()
    for dim, heads in itertools.product(DIMS, (1, 2, 3, 4, 5)):
        model = built(create_model, name, image_size=8, channels=1, dim=dim, heads=heads, depth=1)
        if model is not None:
            made.add((dim, heads))
            assert model(torch.randn(1, 1, 8, 8)).shape == (1, 1, 8, 8)
    assert made == {(d, h) for d in DIMS for h in (1, 2, 3, 4, 5) if d % 4 == 0 and d % h == 0}


@pytest.mark.parametrize("size, patch", [(8, 3), (8, 16), (9, 2), (7, 4), (8, 8)])
def test_images_that_are_no_whole_number_of_patches_are_refused(size, patch):
    model = built(create_model, "ViT-digits/2", image_size=size, channels=1, patch=patch, depth=1)
    assert (model is not None) == (size % patch == 0 and size >= patch)


@pytest.mark.parametrize("variant", ["ddpmpp", "ncsnpp"])
@torch.no_grad()
def test_a_unet_whose_widths_have_no_groups_is_refused_when_built(variant):
    made = set()
    for base, mult in itertools.product((1, 4, 6, 8, 16, 24, 32, 40, 48, 64), ((1,), (1, 2), (2, 2), (1, 3))):
        sizes = dict(base=base, mult=mult, blocks=1, variant=variant)
        teacher = built(create_teacher, "unet-digits", image_size=8, channels=1, **sizes)
        if teacher is not None:
            made.add((base, mult))
            assert teacher(torch.randn(1, 1, 8, 8), 1.0).isfinite().all()
    assert {(32, m) for m in ((1,), (1, 2), (2, 2), (1, 3))} <= made
    assert (
        all(base % 4 == 0 for base, _ in made) and (48, (1, 2)) not in made
    )  # 48 and 96 are joined: 144 channels, 32 groups


@pytest.mark.parametrize("size, mult", [(8, ()), (8, (0,)), (6, (1, 1, 1)), (8, (1,) * 5), (7, (1, 1)), (1, (1, 1))])
def test_a_unet_that_does_not_fit_the_image_is_refused_when_built(size, mult):
    assert built(create_teacher, "unet-digits", image_size=size, channels=1, base=8, mult=mult) is None


@pytest.mark.parametrize("n, m", [(0, 20), (1, 20), (2, 20), (FEWEST - 1, 20), (20, 1), (20, FEWEST - 1), (1, 1)])
def test_sets_of_too_few_images_have_no_distance(n, m, digit_features):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (k, 1, 8, 8), dtype=torch.uint8, generator=g) for k in (n, m))
    said = rf"^{n if n < FEWEST else m} .*image" if n else r"^generated images .*\(0, 1, 8, 8\)"
    with pytest.raises(ConfigError, match=said):
        compare(a, b, digit_features)


def test_sets_just_large_enough_have_finite_distances(digit_features):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (FEWEST, 1, 8, 8), dtype=torch.uint8, generator=g) for _ in range(2))
    found = compare(a, b, digit_features)
    assert found.pop("kid_std") is None  # a subset of few is the whole
    assert all(v is not None and torch.isfinite(torch.tensor(v)) for v in found.values())


def test_sets_of_one_image_repeated_have_a_distance(digit_features):
    a = torch.zeros(FEWEST, 1, 8, 8, dtype=torch.uint8)
    assert compare(a, a, digit_features)["fd"] == pytest.approx(0, abs=1e-3)


@pytest.fixture(scope="module")
def digit_features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, create_classifier(num_classes=10, image_size=8, channels=1))
    return load_features(path)


WRONG = dict(
    none=None,
    word="nonsense",
    negative=-1,
    zero=0,
    nan=float("nan"),
    fraction=0.5,
    yes=True,
    empty_list=[],
    object=object(),
    matrix=torch.zeros(2, 3),
    bytes=torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
    no_images=torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
    nan_images=torch.full((2, 1, 8, 8), float("nan")),
)
FILES = dict(missing=None, folder=None, empty=b"", junk=b"junk" * 9, zip=b"PK\x03\x04" + b"\0" * 30)
PUBLIC = [n for n in get_nb.__all__ if not (isinstance(getattr(get_nb, n), type) and n.endswith("Error"))]


def wrong_values(folder):
    "Values of every wrong kind, files among them."
    for name, content in FILES.items():
        path = folder / f"{name}.safetensors"
        if name == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
        yield name, str(path)
    yield from WRONG.items()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_refuses_every_wrong_kind_of_value_in_one_line_of_ours(name, tmp_path, monkeypatch):
    "A path that is no path may be Python's own TypeError; everything else is ours, or accepted."
    monkeypatch.chdir(tmp_path)
    f, told = getattr(get_nb, name), []
    given = inspect.signature(f).parameters.values()
    needed = [p for p in given if p.default is p.empty and p.kind is not p.VAR_KEYWORD] or list(given)
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in needed)
    for kind, value in wrong_values(tmp_path):
        keywords = {p.name: value for p in needed if p.kind is p.KEYWORD_ONLY}
        try:
            f(*[value] * positional, **keywords)
        except (ConfigError, FileError) as e:
            assert "\n" not in str(e) and len(str(e)) > 10, kind
            told.append(kind)
        except TypeError as e:
            assert "os.PathLike" in str(e), kind
    assert told, f"{name} accepts everything"


# One wrong argument among right ones: what each role refuses.
NO_NUMBER = dict(none=None, word="nonsense", nan=float("nan"), list=[1], object=object(), negative=-1)
NO_COUNT = NO_NUMBER | dict(zero=0, fraction=0.5, infinite=float("inf"), matrix=torch.zeros(2, 3))
NO_LEVEL = NO_NUMBER | dict(zero=0, infinite=float("inf"), complex=1j, matrix=torch.zeros(2, 3))
NO_FUNCTION = dict(word="nonsense", number=3, list=[1, 2], tensor=torch.zeros(2), mapping=dict(a=1))
NO_STATES = dict(none=None, word="x", number=1.0, whole=torch.zeros(2, 3, dtype=torch.long), scalar=torch.tensor(1.0))
NO_IMAGES = NO_STATES | dict(flat=torch.zeros(2, 3), complex=torch.zeros(2, 1, 8, 8, dtype=torch.complex64))
NO_LABELS = dict(word="x", too_large=torch.tensor([0, 10]), negative=torch.tensor([0, -2]), real=torch.zeros(2))
NO_LABELS |= dict(too_few=torch.tensor([1]), list=[1, 2], yes=torch.tensor([True, False]))
NO_MODEL = dict(none=None, word="x", function=len, foreign=torch.nn.Linear(2, 2))
NO_CONFIG = dict(none=None, mapping={}, word="x")
NO_BYTES = NO_IMAGES | dict(real=torch.zeros(9, 1, 8, 8), empty=torch.zeros(0, 1, 8, 8, dtype=torch.uint8), mapping={})
NO_BYTES |= dict(other_size=torch.zeros(9, 1, 4, 16, dtype=torch.uint8), few=torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
NO_NAME = dict(none=None, word="nonsense", number=3, list=["x"], mapping={}, tensor=torch.zeros(2))
NO_WEIGHTS = dict(missing="nowhere", folder=".", empty="", long="x" * 300, number=3, tensor=torch.zeros(2))
NO_LIST = dict(number=3, word="ab", fractions=[0.5], outside=[99], mapping=dict(a=1), zero=[0])


def half(z):
    return 0.5 * z


SOLVER = dict(f=NO_FUNCTION, z0=NO_STATES, max_iter=NO_COUNT, tau=NO_LEVEL, stop_mode=NO_NAME, select=NO_NAME)
LEVELS = dict(num_steps=NO_COUNT, sigma_min=NO_LEVEL, sigma_max=NO_LEVEL, rho=NO_LEVEL)
SAMPLER = LEVELS | dict(denoiser=NO_FUNCTION, noise=NO_IMAGES, labels=NO_LABELS)
SHAPE = dict(image_size=NO_COUNT, channels=NO_COUNT, name=NO_NAME, pretrained=NO_WEIGHTS)
RECIPE = dict(
    noise=NO_IMAGES, image=NO_IMAGES, labels=NO_LABELS, shard_size=NO_COUNT, first_seed=dict(a=-1, b="x", c=0.5)
)
LEARN = dict(pairs=NO_NAME, cfg=NO_CONFIG, train_cfg=NO_CONFIG, probe=NO_FUNCTION, distance=NO_FUNCTION)
MEASURE = dict(
    model=NO_MODEL, cfg=NO_CONFIG, train=NO_BYTES, test=NO_BYTES, network=NO_MODEL, data=dict(none=None, n=3)
)
ROLES = dict(
    fixed_point_iter=SOLVER,
    anderson=SOLVER | dict(window=NO_COUNT),
    broyden=SOLVER | dict(window=NO_COUNT),
    solve=dict(f=NO_FUNCTION, z0=NO_STATES, solver=NO_NAME, max_iter=NO_COUNT),
    equilibrium=dict(f=NO_FUNCTION, z0=NO_STATES, gradient=NO_NAME, max_iter=NO_COUNT),
    unroll=dict(f=NO_FUNCTION, z0=NO_STATES, n_iter=NO_COUNT, supervise=NO_LIST),
    unroll_constant=dict(f=NO_FUNCTION, z0=NO_STATES, n_iter=NO_COUNT, supervise=NO_LIST, read=NO_FUNCTION),
    edm_sigmas=LEVELS,
    heun_sample=SAMPLER,
    euler_sample=SAMPLER,
    create_model=SHAPE | dict(dim=NO_COUNT, heads=NO_COUNT),
    create_teacher=SHAPE | dict(base=NO_COUNT),
    load_data=dict(name=NO_NAME, split=NO_NAME, n=NO_COUNT),
    load_features=dict(source=NO_WEIGHTS),
    save_checkpoint=dict(path=dict(folder=".", empty=""), model=NO_MODEL, note=dict(set={1}, tensor=torch.zeros(2))),
    save_pairs=RECIPE,
    generate_pairs=dict(denoiser=NO_MODEL | dict(foreign="x"), cfg=NO_CONFIG),
    import_reference_pairs=dict(src=NO_WEIGHTS, shard_size=NO_COUNT),
    compare=dict(generated=NO_BYTES, reference=NO_BYTES, network=NO_MODEL),
    train=dict(model=NO_MODEL | dict(foreign="x"), loss_fn=NO_FUNCTION, cfg=NO_CONFIG),
    distill=LEARN | dict(model=NO_MODEL, formulation=NO_FUNCTION),
    evaluate=MEASURE | dict(formulation=NO_FUNCTION, spread=NO_FUNCTION),
)


@pytest.fixture(scope="module")
def right(tmp_path_factory, digit_features):
    "Arguments with which each function does what it is for."
    folder, shape = tmp_path_factory.mktemp("right"), dict(image_size=8, channels=1)
    student = get_nb.create_model("GET-digits/2", num_classes=10, dim=8, heads=2, depth=1, **shape).eval()
    teacher = get_nb.create_teacher("unet-digits", num_classes=10, base=8, **shape).eval()
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    images = torch.randint(0, 256, (FEWEST, 1, 8, 8), dtype=torch.uint8)
    save_checkpoint(folder / "classifier.safetensors", create_classifier(num_classes=10, **shape))
    get_nb.save_pairs(folder / "pairs", noise, noise, labels, num_classes=10)
    released.write_pairs(folder / "released", ["1"], 4, 0, (1, 8, 8))
    map_ = dict(f=half, z0=torch.ones(2, 3))
    sample = dict(denoiser=teacher, noise=noise, labels=labels, num_steps=2)
    train_cfg = get_nb.TrainConfig(steps=1, batch_size=2)
    few = get_nb.EvalConfig(samples=FEWEST, batch_size=FEWEST)
    made = dict(noise=noise, image=noise, labels=labels, num_classes=10)
    split = get_nb.load_data("digits")
    return dict(
        dict.fromkeys(("fixed_point_iter", "anderson", "broyden", "solve", "equilibrium"), map_ | dict(max_iter=2)),
        **dict.fromkeys(("unroll", "unroll_constant"), map_ | dict(n_iter=2)),
        **dict.fromkeys(("heun_sample", "euler_sample"), sample),
        edm_sigmas=dict(num_steps=2),
        create_model=dict(name="ViT-digits/2", **shape),
        create_teacher=dict(name="unet-digits", base=8, **shape),
        load_data=dict(name="shapes", split="train", n=4),
        load_features=dict(source=folder / "classifier.safetensors"),
        save_checkpoint=dict(path=folder / "new.safetensors", model=student),
        save_pairs=dict(folder=folder / "new", **made),
        generate_pairs=dict(
            denoiser=teacher, folder=folder / "made", cfg=PairsConfig(n=2, shape=(1, 8, 8), teacher="")
        ),
        import_reference_pairs=dict(src=folder / "released", folder=folder / "imported"),
        compare=dict(generated=images, reference=images, network=digit_features),
        train=dict(model=torch.nn.Linear(2, 1), loss_fn=lambda net, *_: net(torch.ones(2, 2)).mean(), cfg=train_cfg),
        distill=dict(
            model=student, pairs=get_nb.PairDataset(folder / "pairs"), cfg=get_nb.DistillConfig(), train_cfg=train_cfg
        ),
        evaluate=dict(model=student, cfg=few, train=split, test=split, network=digit_features, data="digits"),
    )


@pytest.mark.parametrize("name", ROLES)
def test_one_wrong_argument_among_right_ones_is_refused_in_one_line_of_ours(name, right, tmp_path, monkeypatch):
    "A file may be refused by an OSError that names it, a path that is no path by Python's own TypeError."
    monkeypatch.chdir(tmp_path)
    f, fresh = getattr(get_nb, name), itertools.count()
    for argument, values in ROLES[name].items():
        for kind, value in values.items():
            given = right[name] | {argument: value}
            if "folder" in given:
                given["folder"] = tmp_path / str(next(fresh))
            with pytest.raises((ConfigError, FileError, OSError, TypeError)) as e:
                f(**given)
                pytest.fail(f"{argument} = {kind} was accepted")
            assert "\n" not in str(e.value) and len(str(e.value)) < 1200, (argument, kind)
            ours = isinstance(e.value, ConfigError | FileError)
            no_path = isinstance(e.value, TypeError) and "os.PathLike" in str(e.value)
            assert ours or no_path or getattr(e.value, "filename", None), (argument, kind)
    given = right[name]
    if "folder" in given:
        given = given | dict(folder=tmp_path / "right")
    f(**given)
