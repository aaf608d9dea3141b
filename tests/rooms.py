"""Run rooms in a kernel of their own, save their outputs, or compare them with the saved ones.

python tests/rooms.py [NOTEBOOK ...]      run (all of nbs and nbs/lab by default) and save the outputs: `make rooms`

A code cell tagged `timed` shows what depends on machine and moment: it is run, not compared. Elsewhere the text must be
the same but for its numbers, which may differ by 5% or 1e-6 (tag `loose`: by half; whole numbers of 1,000 and more, which
are counts, not at all), and pictures must have the same size and about as much ink, and differ by at most 12% of full
contrast on average.
"""

import base64
import io
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
ROOMS = [*sorted((ROOT / "nbs").glob("*.ipynb")), *sorted((ROOT / "nbs/lab").glob("*.ipynb"))]
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
RTOL, ATOL, LOOSE = 0.05, 1e-6, 0.5
PATIENT = dict(kernel_name="python3", timeout=300, iopub_timeout=300)  # a busy machine may show late what a cell made
SIZE, CONTRAST = 0.05, 0.12  # of a picture: share of its sides, and mean difference of its pixels
INK = 0.6  # least share of what is not white that stays: a blank picture differs little from a thin line


os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, whatever kernels the user has
# as it is now: what a test sets for itself, while rooms run beside it, is not for their kernels
SURROUNDINGS = dict(os.environ, GET_NB_PROGRESS="off", GET_NB_CHOICES="first", OMP_NUM_THREADS="1")


def run(path):
    "-> the executed notebook and the seconds that it took; raises CellExecutionError."
    nb, began = nbformat.read(path, 4), time.time()
    client = NotebookClient(nb, **PATIENT, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=SURROUNDINGS)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidy(o) for o in merged(cell.outputs)]
    return nb, time.time() - began


def merged(outputs):
    "Pieces of one stream put together: how it is cut depends on the moment."
    out = []
    for o in outputs:
        if o.output_type == "stream" and out and out[-1].output_type == "stream" and out[-1].name == o.name:
            out[-1].text += o.text
        else:
            out.append(o)
    return out


def tidy(output):
    if "execution_count" in output:
        output.execution_count = None
    output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return output


def save(path, nb):
    "Write the outputs, and nothing else that a run leaves behind."
    raw = json.loads(nbformat.writes(nb))
    for cell in raw["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in ("tags", "jupyter")}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
    raw["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps(raw, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def text_of(output):
    "What a reader reads of an output."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output.get("data", {})
    return "".join(next((data[k] for k in ("text/markdown", "text/plain") if k in data), ""))


def number(text):
    return float(text.replace(",", "").replace("−", "-"))


def compare_text(old, new, rtol):
    "-> what differs, or ''."
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        return f"text differs: {old.strip()[:300]!r} saved, {new.strip()[:300]!r} now"
    for a, b in zip(map(number, NUMBER.findall(old)), map(number, NUMBER.findall(new))):
        counted = rtol == RTOL and a >= 1000 and a.is_integer()
        if abs(a - b) > max(ATOL, 0 if counted else rtol * max(abs(a), abs(b))):
            return f"{a:g} saved, {b:g} now, in {new.strip()[:200]!r}"
    return ""


def compare_picture(old, new):
    a, b = (Image.open(io.BytesIO(base64.b64decode("".join(p)))).convert("RGB") for p in (old, new))
    if any(abs(x - y) > SIZE * x for x, y in zip(a.size, b.size)):
        return f"a picture of {a.size} saved, of {b.size} now"
    a, b = np.asarray(a, float) / 255, np.asarray(b.resize(a.size), float) / 255
    off, (ink, now) = np.abs(a - b).mean(), ((1 - x).mean() for x in (a, b))
    if off > CONTRAST:
        return f"a picture differs by {off:.0%} of full contrast"
    return "" if INK * ink <= now <= ink / INK else f"a picture's ink: {ink:.1%} of the page saved, {now:.1%} now"


def differences(path, nb):
    "What a run shows that is not what is saved."
    found = []
    saved = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for i, (old, new) in enumerate(zip(saved, (c for c in nb.cells if c.cell_type == "code"))):
        tags = old["metadata"].get("tags", [])
        if "timed" in tags:
            continue
        if len(old["outputs"]) != len(new.outputs):
            found.append(f"code cell {i}: {len(old['outputs'])} outputs saved, {len(new.outputs)} now")
            continue
        for a, b in zip(old["outputs"], new.outputs):
            pictures = [o.get("data", {}).get("image/png") for o in (a, b)]
            said = compare_text(text_of(a), text_of(b), LOOSE if "loose" in tags else RTOL)
            drawn = compare_picture(*pictures) if all(pictures) else ""
            found += [f"code cell {i}: {m}" for m in (said, drawn) if m]
    return found


def main(names):
    paths = [Path(n).resolve() for n in names] or ROOMS
    with ThreadPoolExecutor(2) as pool:
        for path, (nb, seconds) in zip(paths, pool.map(run, paths)):
            save(path, nb)
            print(f"{path.relative_to(ROOT)}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
