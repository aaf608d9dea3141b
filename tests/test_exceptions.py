"""What cannot be built or measured is refused by us, in one line that names the culprit; no library's exception comes through."""

import inspect
import itertools

import pytest
import torch

import get_nb
from get_nb.lab.core import ConfigError, FileError
from get_nb.lab.checkpoints import create_model, create_teacher
from get_nb.lab.metrics import _FEWEST as FEWEST
from get_nb.lab.classifier import create_classifier
from get_nb.lab.files import save_checkpoint
from get_nb.lab.metrics import compare, load_features


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
    assert all(v is not None and torch.isfinite(torch.tensor(v)) for v in compare(a, b, digit_features).values())


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
