"""Every number on every page: found in a record, asserted where it stands, or listed here with the reason."""

import ast
import hashlib
import json
import re

import pytest

from conftest import ROOT, traced_cells
from lint import cells, source

TABLES = sorted([*ROOT.glob("results/*/tables/*.json"), *ROOT.glob("results/bench/bench_*.json")])
MANIFESTS = sorted(ROOT.glob("results/*/manifest.json"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results/README.md", *sorted(ROOT.glob("nbs/**/*.ipynb"))]
PAPER = sorted(ROOT.glob("nbs/paper/*.ipynb"))


def relative(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# What is published

WORDED = {
    "table_claims",
    "table_7_scaling",
    "table_7_pairs",
}  # tables whose cells are sentences or fits, written by code from records


@pytest.mark.parametrize("path", [p for p in TABLES if p.stem.startswith("table_7")], ids=relative)
def test_the_distances_of_a_fit_are_those_of_its_records(path):
    for row in read(path)["rows"]:
        found = []
        for where in row["sources"]:
            stage, key = where.split(":")
            value = read(path.parents[1] / f"records/{stage}/record.json")
            for k in key.split("."):
                value = value[int(k) if isinstance(value, list) else k]
            found.append(value)
        seeds = int(row["points"].split(" x ")[1])
        shown = [float(x) for x in row["fds"].split(" … ")]
        if seeds == 1:
            assert {f"{x:.2f}" for x in shown} <= {f"{v:.2f}" for v in found}
        assert len(found) >= seeds and all(min(found) - 0.01 < x < max(found) + 0.01 for x in shown)


@pytest.mark.parametrize("path", TABLES, ids=relative)
def test_every_cell_of_a_published_table_is_in_the_records_it_names(path):
    records = path.parent if path.name.startswith("bench") else path.parents[1] / "records"
    found = list(traced_cells(read(path), records))
    assert found or path.stem in WORDED
    assert not [(key, c, r) for key, c, r in found if c["value"] != pytest.approx(r, rel=1e-9, abs=1e-12)]


@pytest.mark.parametrize("path", TABLES, ids=relative)
def test_a_published_table_is_printed_as_its_cells_say_and_its_page_shows_it(path):
    from get_nb.lab.records import table_markdown

    printed = table_markdown(read(path))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == printed
    if path.parent.name == "tables":
        shown = [o for c in cells(path.parents[1] / f"pages/{path.stem}.ipynb") for o in c["outputs"] if "data" in o]
        assert printed in ["".join(o["data"].get("text/markdown", "")) for o in shown]


@pytest.mark.parametrize("path", MANIFESTS, ids=relative)
def test_what_is_published_is_what_the_manifest_lists_and_ran_where_it_says(path):
    listed = {}
    for stage, entry in read(path)["stages"].items():
        listed |= entry["files"]
        record = path.parent / f"records/{stage}/record.json"
        if record.is_file():
            said = read(record)
            assert said["provenance"]["hardware"] == entry["hardware"], stage
            assert said.get("seconds", 0) <= entry["seconds"], stage  # the training within the stage
    there = {p.relative_to(path.parent).as_posix(): p for p in path.parent.rglob("*") if p.is_file() and p != path}
    assert {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in there.items()} == listed


def test_the_report_says_what_every_published_profile_took_and_ran_on():
    text = (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert MANIFESTS and not [p.parent.name for p in MANIFESTS if f"<!-- hours: {p.parent.name} -->" not in text]


def hours(profile, groups):
    "Hours of a profile's groups on its machine: one stage after another, and with all threads in use."
    stages = read(ROOT / f"results/{profile}/manifest.json")["stages"].values()
    stages = [s for s in stages if s["group"] in groups]
    shares = [s["hardware"].get("threads", 1) / s["hardware"]["cores"] for s in stages]
    return sum(s["seconds"] for s in stages) / 3600, sum(s["seconds"] * p for s, p in zip(stages, shares)) / 3600


def test_the_times_in_the_readme_are_those_of_the_published_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    low, high = map(int, re.search(r"default profile: (\d+) to (\d+) minutes", text).groups())
    assert low <= 60 * min(hours("cpu", [""])) and 60 * max(hours("cpu", [""])) <= high
    assert "unconditional  # rates, then three seeds: two hours" in text
    longest, shortest = hours("cpu-full", ["", "search", "unconditional"])
    assert shortest < 2 < longest


SHAPES = {"GET-B/2": (32, 3), "GET-digits/2": (8, 1), "GET-digits-30/2": (8, 1), "GET-fashion/4": (28, 1)}


def test_the_shares_that_room_26_states_are_those_of_the_models():
    import torch

    from get_nb.presets import build_model

    text = "".join(map(source, cells(ROOT / "nbs/26_presets.ipynb", "markdown")))
    said = {name: int(share) for name, share in re.findall(r"`(GET-[\w/-]+)` repeats (\d+)%", text)}
    assert said.keys() == SHAPES.keys()
    for name, (size, channels) in SHAPES.items():
        with torch.device("meta"):
            model = build_model(name, image_size=size, channels=channels)
        repeated = sum(p.numel() for p in model.deq_blocks.parameters())
        assert said[name] == round(100 * repeated / sum(p.numel() for p in model.parameters())), name


# What is typed

QUANTITY = re.compile(
    r"""\d[\d,]*\.\d+(?:[ -]?[^\W\d_]+(?:/s)?\b|\ ?%)?
      | \d[\d,.]*[ -]?(?:%|(?:percent|ms|s|seconds?|minutes?|min|hours?|h|kB|MB|GB|TB|times|fold|images/s|[MGT]?FLOPs?|[MG]MAC)\b)
      | ±
      | \b(?:FD|FID|KID|IS|LPIPS|[Rr]ecall|[Pp]recision|[Aa]ccuracy)\b[\w-]*(?:\ \w+){0,2}\ \d[\d.]*""",
    re.X,
)  # a decimal, a number with a unit, a spread, a metric and its value
NO_RESULT = re.compile(
    r"""[−-]?\d[\d.]*\ (?:\.\.|…)\ [−-]?\d[\d.]*          # a range
      | arXiv:?\ ?\d{4}\.\d{5} | (?:sections?|version|Python|torch|torchdeq|Since)\ v?\d[\d.]*(?:\ to\ \d[\d.]*)?
      | Apache-2\.0 | 95%\ interval | \(95%\) | \b1e-?\d+ | It\ runs\ in\ (?:about\ )?\d+\ seconds  # what a room costs: tests/rooms.py prints it""",
    re.X,
)

CHOSEN = "chosen or defined, not measured"
PLAIN = "arithmetic that the sentence itself does"
TYPED = {
    "README.md": {
        "10 to 40 minutes": "test_the_times_in_the_readme_are_those_of_the_published_runs",
        "14 to 30 minutes": "measured by hand: the tests cannot time themselves",
        "7 GB": "measured by hand: the size of .venv; the versions are pinned",
        "keeps 57% of its weights": "test_the_shares_in_the_readme_are_those_of_the_models",
        "GET-B 80%": "test_the_shares_in_the_readme_are_those_of_the_models",
    },
    "nbs/index.ipynb": {"0.5 for CIFAR-10": CHOSEN},
    "nbs/differences.ipynb": {
        "residual is under 0.001": CHOSEN,
        "80% in GET-B": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "try 30%, 57% and 80%": "the name of a design in profile cpu-full",
        "0.9999 per step": CHOSEN,
        "dropout 0.13": CHOSEN,
        "dropout 0.2": CHOSEN,
        "ridge of 0.0001": CHOSEN,
    },
    "nbs/10_precond.ipynb": {
        "0.5 for CIFAR-10, 0.752 for digits": CHOSEN,
        "vary by more than 0.1": "(waves.std(0) > 0.1)",
        "Below 0.3 the ideal denoiser makes no error": "assert lowest[0.3] < 0.01",
        "levels lie below 0.3": "assert abs(below - 0.5) < 0.01",
    },
    "nbs/11_unet.ipynb": {"100,000 times smaller": "gain=1e-5", "0.3M parameters": CHOSEN},
    "nbs/12_sampler.ipynb": {
        "scalars | 80 .. 0.002": CHOSEN,
        "up to 4% wider than the data, whose spread is 0.5": "abs(right - 0.5) < 0.02",
        "below 0.2%": "abs(spread - 0.5) < 0.001",
    },
    "nbs/14_teachers.ipynb": {
        "55.7 and 56.4 million": '"edm-cifar10-32x32-cond-ve": 56_400_643',
        "levels 0.1, 0.3, 1 and 3": CHOSEN,
    },
    "nbs/19_fixed_point.ipynb": {
        "slope −0.67": PLAIN,
        "slope −1.5": CHOSEN,
        "from −1.5 to 0.5": CHOSEN,
        "(3, 4.5) it is 0.5, and 0.5 over √29.25": "[[5.0, 0.5]]",
        "at most 6 times": CHOSEN,
        "here 0.5": "0.5 * W / torch.linalg.eigvals(W)",
    },
    "nbs/22_solvers.ipynb": {
        "0.5, 0.9 and 0.99 (lab room problems)": CHOSEN,
        "radius 0.99 should need": PLAIN,
        "Start it at 0.1": CHOSEN,
        "0.739085": "answer = 0.739085",
    },
    "nbs/24_jacobian.ipynb": {"to within 5%": "assert (factor / rho - 1).abs().max() < 0.05"},
    "nbs/26_presets.ipynb": {
        "same to within 5%": "assert abs(share(iterations) - 1) < 0.05",
        "repeats 80% of its parameters": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "repeats 57%": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "repeats 56%": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "repeats 30%": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "within 1%": "counts[get] - 1) < 0.01",
        "within 2%": '["GET-digits/2"] / 5 - 1) < 0.02',
    },
    "nbs/30_losses.ipynb": {"528 MB": CHOSEN},
    "nbs/31_distillation.ipynb": {
        "0.8 as released": CHOSEN,
        "below 0.1 is 5% of the range": "max(error.values()) < 0.1",
    },
    "nbs/40_kd.ipynb": {"FID 9.36 on CIFAR-10": "published: Consistency Models, table 1"},
    "nbs/41_progressive.ipynb": {
        "FID 2.57 at 8 steps, 3.00 at 4": "published: Salimans & Ho (2022)",
        "8.34 at 1": "published: Consistency Models, table 1",
    },
    "nbs/42_consistency.ipynb": {
        "FID 3.55 in one step, 2.93 in two": "published: locuslab/ect's README",
        "0.002, where": CHOSEN,
        "−1, 0.2 and 1": "torch.tensor([-1.0, 0.2, 1.0])",
        "from 80 to 0.002": CHOSEN,
        "deviation 0.25 instead of 0.5": CHOSEN,
        "= 0.1, 0.5 and 2 (200,000 images": CHOSEN,
        "agree to 1%": "abs(found / predicted - 1) < 0.01",
    },
    "nbs/43_meanflow.ipynb": {"FID 2.92 in one step": "published: MeanFlow (Geng et al. 2025)"},
    "nbs/44_discriminator.ipynb": {"64 times more": PLAIN, "agrees to 0.03": "abs(a - 2) < 0.03 and abs(b) < 0.03"},
    "nbs/45_gdd.ipynb": {
        "FID 1.54 on CIFAR-10": "published: Zheng and Yang, arXiv 2405.20750",
        "84.4% of 56.4M parameters": "round(100 * (1 - trained / total), 1) == 84.4",
        "8.8M train": "{trained / 1e6:.1f}M trained",
        "within 15%": "abs(between / spread(before) - 1) < 0.15",
    },
    "nbs/lab/07a_clothes.ipynb": {"| 0.706 |": CHOSEN},
    "nbs/lab/10_schedule.ipynb": {"0.5M images, at most 5%": CHOSEN},
    "nbs/lab/13b_effnet.ipynb": {"4.7 million parameters": 'print(f"{count:,} parameters'},
    "nbs/lab/14_metrics.ipynb": {"KID takes 100 random subsets": CHOSEN},
    "nbs/lab/17_choices.ipynb": {"takes 1 ms in one library and 2 ms in another": "an example, not a measurement"},
    "nbs/lab/21a_scaling.ipynb": {"p is below 0.05": 'f["p"] < 0.05'},
    "nbs/lab/28_problems.ipynb": {"0.5, 0.9 and 0.99": CHOSEN},
    "nbs/lab/40_publishing.ipynb": {"16 MB": "_MOST_BYTES = 16 * 2**20"},
    "nbs/lab/40b_check.ipynb": {
        "at most 15%": "MOST = 0.15",
        "more than 15%": "MOST = 0.15",
        "has the 15%": "MOST = 0.15",
        "error of 20%": "test_an_error_of_a_fifth_is_found_wherever_it_is",
    },
    "nbs/lab/41_costs.ipynb": {"81.2 GMAC an image, ViT-L 80.5": '(("GET-B/2", 81.2), ("ViT-L/2", 80.5))'},
    "nbs/paper/solvers.ipynb": {"0.5, 0.9 and 0.99": CHOSEN},
    "nbs/paper/table_7_scaling.ipynb": {"±": "how a spread is written", "< 0.001": "p < 0.001"},
    "nbs/paper/table_claims.ipynb": {
        "repeats 80% of its parameters": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "GET-B repeats 80%": "test_the_shares_that_room_26_states_are_those_of_the_models",
        "raw state, 30%": "the name of a design in profile cpu-full",
        "normalised state, 57%": "the name of a design in profile cpu-full",
        "±": "how a spread is written",
    },
}  # page -> what is typed there -> what keeps it true: code of that page, a test, a source that it names, or a reason
REASONS = ("measured by hand", "the name of", "how a", "an example", CHOSEN, PLAIN)


def typed_in(path):
    "What people have typed on a page: prose without formulas, code, links, and blocks that code fills."
    if path.suffix == ".ipynb":
        text = "\n\n".join(map(source, cells(path, "markdown")))
    else:
        text = path.read_text(encoding="utf-8")
    if path.name != "README.md":  # whose examples state times
        text = re.sub(r"```.*?```", "·", text, flags=re.S)
    text = re.sub(r"<!-- (?:table|value|hours): [^>]+? -->.*?<!-- end -->", "", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$|(?<!`)`[^`\n]+`(?!`)", "·", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", text) + "\n".join(strings_of(path) if path in PAPER else [])


def strings_of(path):
    "Texts in the code of an experiment: titles, notes, sentences; formats left out."
    for c in cells(path):
        tree = ast.parse(source(c))
        formats = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FormattedValue) and f.format_spec
                   for n in ast.walk(f.format_spec)}  # fmt: skip
        for n in ast.walk(tree):
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in formats:
                yield n.value


def unexplained(text, known):
    "Numbers in a text that look measured and are not listed."
    for fragment in known:
        text = text.replace(fragment, "·")
    text = NO_RESULT.sub("·", text)
    return [" ".join(text[max(0, m.start() - 60) : m.end() + 20].split()) for m in QUANTITY.finditer(text)]


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_no_measured_number_is_typed_on_a_page(path):
    found = unexplained(typed_in(path), TYPED.get(relative(path), {}))
    assert not found, "fill it from a record (room 49, readme; an output), or list it in TYPED with what keeps it true"


@pytest.mark.parametrize(
    "sentence",
    [
        "GET reaches an FD-digits of 17.09 here.",
        "It trains in 12 minutes.",
        "This is 3 times faster.",
        "Recall falls to 1 of 2, and memory to 40 MB.",
        "A distance of 17 ± 1.",
        "FD 17",
        "half of the weights, 31% of them",
        "1,007 images/s",
    ],
)
@pytest.mark.parametrize("path", [PAGES[0], PAGES[2]], ids=relative)
def test_a_number_that_is_typed_is_noticed(path, sentence):
    known = TYPED.get(relative(path), {})
    assert len(unexplained(typed_in(path) + f"\n\n{sentence}\n", known)) > len(unexplained(typed_in(path), known))


@pytest.mark.parametrize("page", TYPED)
def test_what_keeps_a_typed_number_true_is_there(page):
    path = ROOT / page
    code = "\n".join(map(source, cells(path))) if path.suffix == ".ipynb" else ""
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(map(source, cells(path, "markdown")))
    tests = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("tests/test_*.py"))
    for fragment, why in TYPED[page].items():
        assert fragment in typed_in(path), f"{fragment!r} is no longer typed there: take it from the list"
        if why.startswith("published: "):
            assert why.removeprefix("published: ") in text, why
        elif why.startswith("test_"):
            assert f"def {why}(" in tests, why
        elif not why.startswith(REASONS):
            assert why in code, f"{why}: nothing on the page keeps {fragment!r} true"
