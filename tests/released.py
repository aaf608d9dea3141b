"""Files of exactly the layouts that the authors of GET and EDM, and CIFAR-10, released, made from random numbers."""

import io
import pickle
import struct
import sys
import types
from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from get_nb.teachers import TEACHERS
from get_nb.unet import UNetConfig


def write_get(path, model, zipped=True):
    "A GET .pth: model, ema, opt, args."
    opt = dict(
        state={0: dict(step=torch.tensor(3.0), exp_avg=torch.zeros(2))},
        param_groups=[dict(lr=1e-4, betas=(0.9, 0.999), params=[0])],
    )
    torch.save(
        dict(
            model={k: v + 1 for k, v in model.state_dict().items()},
            ema=model.state_dict(),
            opt=opt,
            args=Namespace(lr=1e-4, model="GET"),
        ),
        path,
        _use_new_zipfile_serialization=zipped,
    )
    return path


def write_pairs(folder, names, per_file, classes=0, shape=(3, 8, 8), dtype=torch.float64, zipped=True, seed=0):
    "A folder of released pairs; -> noise, labels, images in the order in which they belong."
    g, out = torch.Generator().manual_seed(seed), []
    for kind in ("latent", "image"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name in sorted(names):
        noise, image = (
            torch.randn(per_file, *shape, generator=g),
            torch.randn(per_file, *shape, generator=g, dtype=dtype),
        )
        label = torch.randint(max(classes, 1), (per_file,), generator=g)
        latent = [noise, F.one_hot(label, classes).float()] if classes else noise
        torch.save(latent, folder / f"latent/{name}.pkl", _use_new_zipfile_serialization=zipped)
        torch.save(image, folder / f"image/{name}.pkl", _use_new_zipfile_serialization=zipped)
        out.append((noise, label if classes else torch.full((per_file,), -1), image))
    return [torch.cat(v) for v in zip(*out)]


class Persistent:
    "A module as EDM's pickles hold it."

    def __init__(self, class_name, **state):
        self.meta = dict(
            type="class",
            version=6,
            module_src="raise SystemExit('this text was executed')",
            class_name=class_name,
            state=state,
        )

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def nested(state):
    "A flat state dict as nested modules."
    tree = Persistent("Layer", _parameters={}, _buffers={}, _modules={})
    for key, value in state.items():
        at, (*path, last) = tree.meta["state"], key.split(".")
        for part in path:
            at = (
                at["_modules"]
                .setdefault(part, Persistent("Layer", _parameters={}, _buffers={}, _modules={}))
                .meta["state"]
            )
        at["_parameters"][last] = torch.nn.Parameter(value, requires_grad=False)
    return tree


def write_edm(path, teacher, precond="EDMPrecond", network="SongUNet", lacks=(), **change):
    "An EDM .pkl of one of our teachers; of its constructor arguments, `lacks` are left out and `change` are others."
    c = teacher.config
    cfg = replace(TEACHERS[c["name"]], **{k: v for k, v in c.items() if k in UNetConfig.__dataclass_fields__})
    init = dict(
        img_resolution=c["image_size"],
        img_channels=c["channels"],
        label_dim=c["num_classes"],
        model_type=network,
        model_channels=cfg.base,
        channel_mult=list(cfg.mult),
        num_blocks=cfg.blocks,
        attn_resolutions=list(cfg.attention),
        dropout=cfg.dropout,
        augment_dim=cfg.augment_dim,
        decoder_type="standard",
        use_fp16=False,
    )
    init |= (
        dict(embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1])
        if cfg.variant == "ddpmpp"
        else dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
    )
    init = {k: v for k, v in (init | change).items() if k not in lacks}
    module = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise AssertionError('the pickle was executed')", module.__dict__)
    module._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    sys.modules.update({"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module})
    try:
        ema = Persistent(precond, **nested(teacher.state_dict()).meta["state"], _init_args=(), _init_kwargs=init)
        path.write_bytes(pickle.dumps(dict(ema=ema), 4))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return path


def cifar_bytes(data, labels):
    "One of CIFAR-10's files: a pickle of protocol 2, written by Python 2 (byte strings, an old name for numpy's constructor)."
    f, rows, raw = io.BytesIO(), len(data), data.tobytes()

    def short(s):
        return b"U" + bytes([len(s)]) + s

    def number(v):
        return b"J" + struct.pack("<i", v)

    f.write(
        b"\x80\x02}("
        + short(b"batch_label")
        + short(b"a batch")
        + short(b"labels")
        + b"]q\x01("
        + b"".join(b"K" + bytes([v]) for v in labels)
        + b"e"
        + short(b"data")
    )
    f.write(
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
        + short(b"b")
        + b"\x87R(K\x01"
        + number(rows)
        + number(3072)
        + b"\x86"
    )
    f.write(
        b"cnumpy\ndtype\nq\x04"
        + short(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short(b"|")
        + b"NNN"
        + number(-1)
        + number(-1)
        + b"K\x00tb\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
    f.write(short(b"filenames") + b"](" + b"".join(short(b"x.png") for _ in range(rows)) + b"eu.")
    return f.getvalue()


def write_cifar(folder, per_file=60, seed=0):
    "cifar-10-batches-py with made-up images; -> images, labels of the training part."
    rng, out = np.random.RandomState(seed), []
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        labels = [i % 10 for i in range(per_file)]
        data = (rng.randint(0, 120, (per_file, 3072)) + 12 * np.array(labels)[:, None]).astype(np.uint8)
        (folder / "cifar-10-batches-py" / name).write_bytes(cifar_bytes(data, labels))
        out.append((data.reshape(-1, 3, 32, 32), labels))
    return np.concatenate([o[0] for o in out[:5]]), sum((o[1] for o in out[:5]), [])
