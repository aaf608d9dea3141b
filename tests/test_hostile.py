"""Hostile and broken foreign files: refused, named, and never obeyed. A canary file proves that nothing ran."""

import functools
import importlib
import io
import itertools
import json
import operator
import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import released
from get_nb.lab import pickles
from get_nb.lab.imports import import_reference_pairs
from get_nb.lab.released import load_edm_pickle, load_reference_get
from get_nb.lab.checkpoints import load_checkpoint
from get_nb.lab.core import FileError, UnsafeFileError
from get_nb.lab.files import save_tensors
from get_nb.lab.cifar import cifar_batch
from get_nb.lab.checkpoints import create_model
from get_nb.lab.generation import merge_pairs
from get_nb.lab.manifest import pairs_info
from get_nb.lab.store import PairDataset, verify_pairs
from get_nb.lab.archives import read_torch
from get_nb.lab.checkpoints import create_teacher

DATA = Path(__file__).parent / "data"
CANARY = "CANARY"  # replaced by the path of a file that must not appear
TOUCH = f"open({CANARY!r}, 'w').close()"


class Calls:
    "Pickles to a call of `function` with `args`."

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def op(text, *parts):
    "A pickle written by hand."
    return b"\x80\x04" + text + b"".join(parts) + b"."


def uni(s):
    return b"\x8c" + bytes([len(s)]) + s.encode()


def doubled(n):
    "A tuple that holds the one before it twice, n times over: a few bytes that say 2^n values."
    return b"K\x01\x85\x94" + b"".join(bytes([0x68, i, 0x86, 0x94]) for i in range(n))


# Each entry: name -> bytes of a pickle that does harm when it is loaded the usual way (or tries to).
PROGRAMS = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {CANARY}")),
    "os.popen": pickle.dumps(Calls(os.popen, f"touch {CANARY}")),
    "subprocess.run": pickle.dumps(Calls(subprocess.run, ["touch", CANARY])),
    "subprocess.Popen": pickle.dumps(Calls(subprocess.Popen, ["touch", CANARY])),
    "eval": pickle.dumps(Calls(eval, TOUCH)),
    "exec": pickle.dumps(Calls(exec, TOUCH)),
    "compile": pickle.dumps(Calls(compile, TOUCH, "x", "exec")),
    "open": pickle.dumps(Calls(open, CANARY, "w")),
    "getattr chain": pickle.dumps(Calls(getattr, Calls(importlib.import_module, "os"), "system")),
    "functools.partial": pickle.dumps(Calls(functools.partial, os.system, f"touch {CANARY}")),
    "operator.attrgetter": pickle.dumps(Calls(operator.attrgetter, "system")),
    "operator.methodcaller": pickle.dumps(Calls(operator.methodcaller, "system", f"touch {CANARY}")),
    "importlib.import_module": pickle.dumps(Calls(importlib.import_module, "antigravity")),
    "runpy.run_path": pickle.dumps(Calls(runpy.run_path, CANARY)),
    "map of exec": pickle.dumps(Calls(list, Calls(map, exec, [TOUCH]))),
    "torch.load": pickle.dumps(Calls(torch.load, io.BytesIO(b""))),
    "torch.load by name": op(b"\x8c\x05torch\x8c\x04load\x93", uni(CANARY), b"\x85R"),
    "numpy.load": op(b"\x8c\x05numpy\x8c\x04load\x93", uni(CANARY), b"\x85R"),
    "numpy reconstruct": pickle.dumps(np.arange(3)),
    "torch.hub.load": op(b"\x8c\x09torch.hub\x8c\x04load\x93", uni(CANARY), b"\x85R"),
    "GLOBAL": b"cposix\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR.",
    "STACK_GLOBAL": op(uni("posix"), uni("system"), b"\x93", uni(f"touch {CANARY}"), b"\x85R"),
    "STACK_GLOBAL of a dotted name": op(uni("collections"), uni("OrderedDict.fromkeys"), b"\x93"),
    "STACK_GLOBAL without strings": op(b"K\x01K\x02\x93"),
    "INST": b"(S'touch " + CANARY.encode() + b"'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nS'touch " + CANARY.encode() + b"'\no.",
    "NEWOBJ": op(b"\x8c\x05posix\x8c\x06system\x93", uni(CANARY), b"\x85\x81"),
    "NEWOBJ_EX": op(b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)}\x92"),
    "EXT1": op(b"\x82\x01"),
    "EXT2": op(b"\x83\x01\x00"),
    "EXT4": op(b"\x84\x01\x00\x00\x00"),
    "PERSID": b"Posix\n.",
    "BINPERSID": op(uni("storage"), b"Q"),
    "BUILD on a name": op(b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93}\x8c\x08__init__K\x01sb"),
    "BUILD twice": op(b"\x8c\x08argparse\x8c\x09Namespace\x93)\x81}b}b"),
    "call of a call": op(b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R)R"),
    "a list as a key": op(b"}]K\x01s"),
    "a name as a key": op(b"}\x8c\x0bcollections\x8c\x0bOrderedDict\x93K\x01s"),
    "append to a dictionary": op(b"}K\x01a"),
    "set an item of a list": op(b"]K\x01K\x02s"),
    "memo of nothing": op(b"h\x05"),
    "pop of an empty stack": op(b"0"),
    "no mark": op(b"K\x01t"),
    "string that is not utf-8": op(b"\x8c\x02\xff\xfe"),
    "length of 2^63": op(b"\x8d" + struct.pack("<Q", 2**63)),
    "bytes that are not there": op(b"B\xff\xff\xff\x7f"),
    "BYTEARRAY8": op(b"\x96" + struct.pack("<Q", 2**40)),
    "NEXT_BUFFER": op(b"\x97"),
    "INT of many digits": b"I" + b"9" * 5000 + b"\n.",
    "DUP": op(b"K\x012"),
    "POP_MARK": op(b"(K\x011"),
    "a name that is memoised and called later": op(b"\x8c\x05posix\x8c\x06system\x93\x940h\x00", uni(CANARY), b"\x85R"),
    "a namespace that holds itself": op(b"\x8c\x08argparse\x8c\x09Namespace\x93)\x81\x94}\x8c\x01ah\x00sb"),
    "an allowed name with a callable for an argument": op(
        b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93\x8c\x05posix\x8c\x06system\x93\x85R"
    ),
    "a list that holds itself": op(b"]\x94h\x00a"),
    "a dictionary that holds itself": op(b"}\x94\x8c\x01ah\x00s"),
    "nested 100,000 deep": op(b"]" * 100_000 + b"a" * 99_999),
    "a tuple nested 100,000 deep for a key": op(b"})" + b"\x85" * 100_000 + b"K\x01s"),
    "a name nested 100,000 deep": op(b")" + b"\x85" * 100_000 + b"K\x01\x93"),
    "a tuple doubled 60 times for a key": op(b"}", doubled(60), b"K\x01s"),
    "a tuple doubled 60 times for a name": op(doubled(60), b"K\x01\x93"),
    "a tuple doubled 200 times": op(b"}\x8c\x03ema", doubled(200), b"s"),
    "a tuple of more than there is": op(b"K\x01\x86"),
    "a name of a million letters": op(b"X" + struct.pack("<I", 10**6) + b"a" * 10**6, uni("x"), b"\x93"),
    "LONG4": op(b"\x8b" + struct.pack("<i", 9) + b"\x01" * 9),
    "nothing": b"",
    "only text": b"hello, I am not a pickle at all, but quite long",
}


def check(load, path, canary, kind=FileError):
    with pytest.raises(kind) as e:
        load(path)
    message = str(e.value)
    assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 1000
    assert not canary.exists()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the programs touch a file named CANARY in the working directory
    return tmp_path


def test_the_canary_sings_when_a_pickle_is_loaded_the_usual_way(here):
    for name in ("os.system", "exec", "GLOBAL", "INST"):
        try:
            pickle.loads(PROGRAMS[name])
        except Exception:
            pass
        assert (here / CANARY).exists(), name
        (here / CANARY).unlink()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_pickle_is_refused_in_every_place_it_can_hide(name, here):
    program, canary, path = PROGRAMS[name], here / CANARY, here / "evil.pkl"
    path.write_bytes(program)
    check(load_edm_pickle, path, canary)  # as an EDM pickle
    check(read_torch, path, canary)  # as a torch file of the older layout
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True)))
    path.write_bytes(head + program)
    check(read_torch, path, canary)  # as its object
    nested = pickle.dumps(Calls(torch.storage._load_from_bytes, head + program))
    path.write_bytes(nested)
    check(load_edm_pickle, path, canary)  # as a torch file nested in a pickle
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", program)
    check(load_reference_get, path, canary)  # as the pickle of a zip file
    released.write_pairs(here / "src", ["9"], 2, 10)
    latent = here / "src/latent/9.pkl"
    latent.write_bytes(path.read_bytes())
    check(lambda _: import_reference_pairs(here / "src", here / "out"), latent, canary)  # as released pairs, zip
    latent.write_bytes(head + program)
    check(lambda _: import_reference_pairs(here / "src", here / "out"), latent, canary)  # and older
    path.write_bytes(program)
    check(lambda p: cifar_batch(p, None), path, canary)  # as a file of CIFAR-10, were its checksum not looked at
    assert not (here / "out").exists()


BROKEN = {
    "a tuple of more than there is",
    "memo of nothing",
    "no mark",
    "string that is not utf-8",
    "length of 2^63",
    "bytes that are not there",
    "BYTEARRAY8",
    "INT of many digits",
    "nothing",
    "only text",
}


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in BROKEN])
def test_what_tries_to_act_is_called_unsafe(name, here):
    (here / "evil.pkl").write_bytes(PROGRAMS[name])
    check(load_edm_pickle, here / "evil.pkl", here / CANARY, UnsafeFileError)


def small_get(**change):
    model = create_model("GET-digits/2", num_classes=10, image_size=8, channels=1)
    return dict(OrderedDict(model.state_dict()), **change)


STATES = {
    "NaN weights": lambda s: s | {"blocks.0.norm1.bias": torch.full((64,), torch.nan)},
    "infinite weights": lambda s: s | {"blocks.0.norm1.bias": torch.full((64,), torch.inf)},
    "a wrong shape": lambda s: s | {"blocks.0.norm1.bias": torch.zeros(65)},
    "a missing key": lambda s: {k: v for k, v in s.items() if "qkv_inj" not in k},
    "a surplus key": lambda s: s | {"more": torch.zeros(2)},
    "whole numbers for weights": lambda s: {k: v.long() for k, v in s.items()},
    "truths for weights": lambda s: {k: v > 0 for k, v in s.items()},
    "no tokens": lambda s: s | {"pos_embed": torch.zeros(1, 0, 64)},
    "no channels": lambda s: s | {"x_embedder.proj.weight": torch.zeros(64, 0, 2, 2)},
    "a name of a million letters": lambda s: s | {"x" * 10**6: "text"},
    "a text for a tensor": lambda s: s | {"pos_embed": "text"},
    "no tensor at all": lambda s: {},
    "a list": lambda s: [1, 2],
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_that_does_not_fit_is_refused(name, zipped, here):
    torch.save(dict(ema=STATES[name](small_get())), here / "get.pth", _use_new_zipfile_serialization=zipped)
    check(load_reference_get, here / "get.pth", here / CANARY)


def rewrite(source, target, change):
    "Copy a zip, giving each (name, bytes) to `change`, which returns what is written: a list of (name, bytes, compression)."
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w") as b:
        for i in a.infolist():
            for name, data, how in change(i.filename, a.read(i)):
                b.writestr(zipfile.ZipInfo(name), data, how)


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
ZIPS = {
    "a compressed storage (bomb)": lambda n, d: (
        [(n, bytes(len(d)), DEFLATED)] if n.endswith("data/0") else [(n, d, STORED)]
    ),
    "a storage too short": lambda n, d: [(n, d[:-4], STORED)] if n.endswith("data/0") else [(n, d, STORED)],
    "a storage too long": lambda n, d: [(n, d + b"0000", STORED)] if n.endswith("data/0") else [(n, d, STORED)],
    "a missing storage": lambda n, d: [] if n.endswith("data/0") else [(n, d, STORED)],
    "no pickle": lambda n, d: [] if n.endswith("data.pkl") else [(n, d, STORED)],
    "two pickles": lambda n, d: (
        [(n, d, STORED), ("other/data.pkl", d, STORED)] if n.endswith("data.pkl") else [(n, d, STORED)]
    ),
    "a big-endian archive": lambda n, d: [(n, b"big", STORED)] if n.endswith("byteorder") else [(n, d, STORED)],
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_archive_with_hostile_members_is_refused(name, here):
    torch.save(dict(ema=small_get()), here / "good.pth")
    rewrite(here / "good.pth", here / "bad.pth", ZIPS[name])
    check(load_reference_get, here / "bad.pth", here / CANARY)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_and_paths_that_climb_write_nothing(here):
    torch.save(dict(ema=small_get()), here / "good.pth")
    rewrite(here / "good.pth", here / "bad.pth", lambda n, d: [(n, d, STORED)] * (2 if n.endswith("data/0") else 1))
    check(load_reference_get, here / "bad.pth", here / CANARY, UnsafeFileError)
    before = sorted(p.name for p in here.iterdir())
    rewrite(
        here / "good.pth",
        here / "climb.pth",
        lambda n, d: [(n, d, STORED), ("../../escaped", b"x", STORED)] if n.endswith("/version") else [(n, d, STORED)],
    )
    load_reference_get(here / "climb.pth")  # nothing is ever extracted: the member is not even looked at
    assert (
        sorted(p.name for p in here.iterdir()) == sorted([*before, "climb.pth"])
        and not (here.parent.parent / "escaped").exists()
    )


def tensor_pickle(offset, size, stride, n=6):
    "A zip archive whose one tensor claims this view of a storage of 6 floats."

    def write(path):
        torch.save(dict(ema=dict(w=torch.arange(6.0))), path.with_suffix(".good"))
        body = (
            b"\x80\x02}X\x03\x00\x00\x00ema}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            + number(n)
            + b"tQ"
            + number(offset)
            + tuple_of(size)
            + tuple_of(stride)
            + b"\x89ccollections\nOrderedDict\n)RtRss."
        )
        rewrite(
            path.with_suffix(".good"), path, lambda name, d: [(name, body if name.endswith("data.pkl") else d, STORED)]
        )

    return write


def number(v):
    raw = v.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def tuple_of(values):
    return b"(" + b"".join(number(v) for v in values) + b"t"


VIEWS = {
    "more than the storage": (0, (7,), (1,)),
    "an offset outside": (6, (1,), (1,)),
    "a negative offset": (-1, (2,), (1,)),
    "a negative size": (0, (-2,), (1,)),
    "a negative stride": (0, (2,), (-1,)),
    "a stride outside": (0, (2, 2), (5, 5)),
    "a repeated storage (bomb)": (0, (2**30, 2**30), (0, 0)),
    "sizes that overflow": (0, (2**61, 2**61), (1, 1)),
    "strides that overflow": (0, (2, 2), (2**63, 1)),
    "no elements, sizes that overflow": (0, (2**40, 2**40, 0), (1, 1, 1)),
    "no elements, an offset far outside": (2**60, (0,), (1,)),
    "another number of strides": (0, (2, 3), (1,)),
    "nine dimensions": (0, (1,) * 9, (1,) * 9),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_tensor_that_claims_what_its_storage_does_not_hold_is_refused(name, here):
    tensor_pickle(*VIEWS[name])(here / "t.pth")
    with pytest.raises(UnsafeFileError, match="t.pth"):
        read_torch(here / "t.pth")


def test_the_handmade_tensor_is_read_when_it_is_honest(here):
    tensor_pickle(1, (2, 2), (2, 1))(here / "t.pth")
    assert read_torch(here / "t.pth")["ema"]["w"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    tensor_pickle(0, (6,), (1,), n=7)(here / "t.pth")  # a storage that is said to be larger than it is
    with pytest.raises(FileError, match="t.pth"):
        read_torch(here / "t.pth")


def legacy(body, n=6):
    "A torch file of the older layout: a pickle, and one storage of six floats that is said to hold n."
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True)))
    return head + op(body) + pickle.dumps(["0"], 2) + struct.pack("<q", n) + np.arange(6, dtype=np.float32).tobytes()


def storage(n=6):
    return (
        b"(" + uni("storage") + uni("torch") + uni("FloatStorage") + b"\x93" + uni("0") + uni("cpu") + number(n) + b"tQ"
    )


def rebuilt(inner, size=(2,), stride=(1,)):
    return (
        uni("torch._utils")
        + uni("_rebuild_tensor_v2")
        + b"\x93("
        + inner
        + number(0)
        + tuple_of(size)
        + tuple_of(stride)
        + b"tR"
    )


ODD = {
    "a tensor without dimensions for a storage": rebuilt(rebuilt(storage(), (), ()), (), ()),
    "a matrix for a storage": rebuilt(rebuilt(storage(), (2, 3), (3, 1))),
    "a text for a storage": rebuilt(uni("0")),
    "a state for a tensor": rebuilt(storage()) + b"}b",
    "items for a tensor": rebuilt(storage()) + b"K\x01K\x02s",
    "a tensor for the state of a namespace": uni("argparse")
    + uni("Namespace")
    + b"\x93)\x81"
    + rebuilt(storage())
    + b"b",
    "a tensor for the items of a dictionary": uni("collections")
    + uni("OrderedDict")
    + b"\x93"
    + rebuilt(storage())
    + b"\x85R",
    "parameters of parameters": (uni("torch._utils") + uni("_rebuild_parameter") + b"\x93") * 99
    + rebuilt(storage())
    + b"\x85R" * 99,
    "a torch file in a torch file": uni("torch.storage") + uni("_load_from_bytes") + b"\x93B\x00\x00\x00\x00\x85R",
}


@pytest.mark.parametrize("name", ODD)
def test_a_tensor_put_together_in_an_odd_way_is_refused(name, here):
    path = here / "t.pth"
    path.write_bytes(legacy(rebuilt(storage())))
    assert read_torch(path).tolist() == [0.0, 1.0]
    path.write_bytes(legacy(ODD[name]))
    check(read_torch, path, here / CANARY)
    path.write_bytes(pickle.dumps(dict(ema=Calls(torch.storage._load_from_bytes, legacy(ODD[name])))))
    check(load_edm_pickle, path, here / CANARY)


@pytest.mark.parametrize("n", [2**40, 2**61, 2**62, 2**63 - 1])
def test_a_storage_larger_than_any_file_is_refused(n, here):
    for layout, keep in itertools.product((legacy(rebuilt(storage(n)), n), None), (True, False)):
        path = here / "t.pth"
        path.write_bytes(layout) if layout else tensor_pickle(0, (6,), (1,), n)(path)
        check(functools.partial(read_torch, keep=keep), path, here / CANARY)


def test_a_pickle_of_too_many_instructions_is_refused(here, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST", 1000)
    (here / "long.pkl").write_bytes(op(b"]" * 1001))
    check(load_edm_pickle, here / "long.pkl", here / CANARY, UnsafeFileError)


EDM = (DATA / "edm_ddpmpp_cond.pkl").read_bytes()


@pytest.mark.parametrize(
    "old, new, words",
    [
        (b"EDMPrecond", b"VPPrecondX", "VPPrecondX"),
        (b"SongUNet", b"DhariwalU"[:8], "only SongUNet"),
        (b"\x8c\x03ema", b"\x8c\x03emo", "no 'ema'"),
        (b"positional", b"positionaX", "a SongUNet of kind"),
    ],
)
def test_edm_networks_that_are_not_supported_get_one_clear_refusal(old, new, words, here):
    assert old in EDM and len(old) == len(new)
    (here / "edm.pkl").write_bytes(EDM.replace(old, new))
    with pytest.raises(FileError, match=words):
        load_edm_pickle(here / "edm.pkl")


def small_teacher():
    return create_teacher(
        "edm-cifar10-32x32-uncond-vp", image_size=8, base=8, mult=(1,), blocks=1, attention=(), augment_dim=0
    )


BOMB = functools.reduce(lambda t, _: (t, t), range(40), (1,))
ARGUMENTS = dict(
    label_dim=10**9,
    img_channels=10**8,
    model_channels=10**6,
    num_blocks=10**8,
    channel_mult=[1] * 3000,
    augment_dim=2**40,
    img_resolution=-8,
    dropout="much",
    attn_resolutions=8,
    resample_filter=5,
    embedding_type=[1],
    encoder_type=BOMB,
    model_type="x" * 10**6,
    decoder_type=None,
    sigma_data=0.0,
    channel_mult_noise=True,
)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_constructor_arguments_cost_nothing_before_they_are_compared_with_the_tensors(name, here):
    change = {name: ARGUMENTS[name]}
    if name == "channel_mult_noise":
        change |= dict(img_channels="three")
    released.write_edm(here / "edm.pkl", small_teacher(), **change)
    check(load_edm_pickle, here / "edm.pkl", here / CANARY)


def test_a_module_inside_of_many_is_refused_before_they_are_counted(here, monkeypatch):
    grow = released.nested

    def many(state):
        tree = grow(state)
        for _ in range(30):
            tree = released.Persistent("Layer", _parameters={}, _buffers={}, _modules=dict(a=tree, b=tree))
        return tree

    monkeypatch.setattr(released, "nested", many)
    monkeypatch.setattr("get_nb.lab.released._MOST_MODULES", 500)
    released.write_edm(here / "edm.pkl", small_teacher())
    check(load_edm_pickle, here / "edm.pkl", here / CANARY)


MANIFESTS = dict(
    bare={},
    nothing=dict(recipe=dict(shape=[1], num_classes=0), shards=[]),
    text=dict(recipe=dict(shape=[1], num_classes=0), shards="abc"),
    climbs=dict(
        recipe=dict(shape=[1], num_classes=0), shards=[dict(file="../../secret.safetensors", pairs=1, sha256="0")]
    ),
    absolute=dict(recipe=dict(shape=[1], num_classes=0), shards=[dict(file="/etc/hostname", pairs=1, sha256="0")]),
    negative=dict(recipe=dict(shape=[1], num_classes=0), shards=[dict(file="a.safetensors", pairs=-1, sha256="0")]),
)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_reaches_outside_of_its_folder_or_is_incomplete_is_refused(name, here):
    (here / "manifest.json").write_text(json.dumps(dict(kind="pairs", schema=1) | MANIFESTS[name]), encoding="utf-8")
    for use in (pairs_info, verify_pairs, PairDataset, lambda f: merge_pairs([f], f / "merged")):
        with pytest.raises(FileError, match="manifest.json: damaged"):
            use(here)


@pytest.mark.parametrize(
    "info",
    [
        [1],
        dict(kind=[1]),
        dict(kind="checkpoint", schema=1, config="text"),
        dict(kind="checkpoint", schema=1, config=dict(builder=[1])),
        dict(kind="checkpoint", schema=1, config=dict(builder="teacher", name=["x"])),
        dict(kind="checkpoint", schema=1, config=dict(builder="teacher", name="unet-digits", channels=-1)),
    ],
)
def test_a_checkpoint_of_ours_that_says_nonsense_is_one_line(info, here):
    save_tensors(here / "o.safetensors", dict(a=torch.zeros(1)), info)
    check(load_checkpoint, here / "o.safetensors", here / CANARY)


def test_source_text_in_a_pickle_is_data(here):
    from get_nb.lab.pickles import read_pickle

    source = read_pickle(EDM, "edm")["ema"].args[0]["module_src"].encode()
    program = b"open('C','w')"
    assert len(source) >= len(program) and source in EDM
    (here / "edm.pkl").write_bytes(EDM.replace(source, program.ljust(len(source))))
    load_edm_pickle(here / "edm.pkl")
    assert not (here / "C").exists()


LAYOUTS = ["edm", "zip", "legacy", "pairs", "cifar"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused(layout, here):
    load, data, path = accepted(layout, here)
    for cut in (0, 1, 2, 10, 100, 0.25, 0.5, 0.9, -1):
        path.write_bytes(data[: int(len(data) * cut) if isinstance(cut, float) else cut])
        check(load, path, here / CANARY)


def accepted(layout, here):
    "Of one accepted layout: how it is loaded, the bytes of a good file, and where to put them."
    if layout == "edm":
        return load_edm_pickle, EDM, here / "x.pkl"
    if layout == "cifar":
        return (
            lambda path: cifar_batch(path, None),
            released.cifar_bytes(np.zeros((8, 3072), np.uint8), range(8)),
            here / "x.bin",
        )
    if layout == "pairs":
        released.write_pairs(here / "src", ["9"], 20, 10)
        return (
            lambda _: import_reference_pairs(here / "src", fresh(here / "out")),
            (here / "src/latent/9.pkl").read_bytes(),
            here / "src/latent/9.pkl",
        )
    torch.save(dict(ema=small_get(), model=small_get()), here / "x.pth", _use_new_zipfile_serialization=layout == "zip")
    return load_reference_get, (here / "x.pth").read_bytes(), here / "x.pth"


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def flip_bytes(layout, here, flips, seed):
    "Flip single bits; -> how many files were refused. Accepted ones must hold what torch's own restricted reader finds in them."
    load, good, path = accepted(layout, here)
    rng, refused = random.Random(seed), 0
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.randrange(len(bad)) if rng.random() < 0.5 else rng.randrange(min(len(bad), 4000))] ^= (
            1 << rng.randrange(8)
        )
        path.write_bytes(bad)
        try:
            got = load(path)
        except FileError as e:
            refused += 1
            assert str(path) in str(e) and len(str(e).splitlines()) == 1
            continue
        if layout in ("zip", "legacy"):
            try:
                theirs = torch.load(path, weights_only=True)["ema"]
            except Exception:
                continue  # it refuses more than we do
            assert all(torch.equal(v, theirs[k]) for k, v in got.state_dict().items())
    assert not (here / CANARY).exists()
    return refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bytes_are_refused_or_read_as_what_they_say(layout, here):
    print(
        f"{layout}: {flip_bytes(layout, here, 60, seed=7)} of 60 flips refused, the others changed a value and nothing else"
    )


def test_reading_never_imports_what_a_file_names(here):
    code = "import sys; from get_nb.lab.released import load_edm_pickle\ntry: load_edm_pickle(sys.argv[1])\nexcept Exception as e: print(type(e).__name__)\nprint('antigravity' in sys.modules, 'this' in sys.modules)"
    (here / "evil.pkl").write_bytes(pickle.dumps(Calls(importlib.import_module, "antigravity")))
    done = subprocess.run([sys.executable, "-c", code, str(here / "evil.pkl")], capture_output=True, text=True)
    assert done.stdout.split() == ["UnsafeFileError", "False", "False"], done.stderr
