"""The flags of train.py, presets for each size of the network, and what they may be."""

import argparse
import dataclasses
import math
import pathlib
import tempfile

import numpy as np

# What the paper's runs did differently for each size; flags override it.
PRESETS = {
    "tiny": dict(
        steps=1000,
        warmup=100,
        batch_size=16,
        microbatches=1,
        block=128,
        eval_every=100,
        dtype="float32",
        ivon_lr=3.0,
        ivon_b1=0.7,
        ivon_hess_init=0.03,
        ivon_ess=1e8,
        adamw_lr=0.01,
    ),
    "small": dict(ivon_lr=0.3, microbatches=24),
    "medium": dict(ivon_lr=0.2, microbatches=40),
    "large": dict(ivon_lr=0.15, microbatches=120),
}
CHOICES = {
    "size": PRESETS,
    "optimizer": ("ivon", "adamw"),
    "noise": ("shared", "replica"),
    "dtype": ("float32", "bfloat16"),
}
PICTURES = ".png", ".jpg", ".pdf", ".svg"
# Integers are at least 1 and other numbers at least 0, but for these.
LEAST = {"block": 2, "seed": 0, "warmup": 0, "write": 0, "remat": 0}
LEAST |= {"process_id": 0, "cpu_devices": 0}
POSITIVE = {"ivon_ess", "ivon_hess_init", "ivon_clip_radius", "max_norm"}
BELOW_ONE = {"ivon_b1", "ivon_b2", "adamw_b1", "adamw_b2"}
# These may differ between a checkpoint and the run that continues from it.
FREE = {"mesh", "num_samples", "eval_batches", "checkpoint_every", "max_to_keep"}
FREE |= {"checkpoint_dir", "plot", "prompt", "write", "distributed", "num_processes"}
FREE |= {"process_id", "cpu_devices", "heartbeat_seconds"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of a run; each field is also a command-line flag."""

    size: str = "tiny"
    optimizer: str = "ivon"
    data: str = ""  # a text, or a folder with train.bin and val.bin; or the library
    steps: int = 100_000
    warmup: int = 2000  # steps, at most a tenth of them
    batch_size: int = 480  # sequences a step, over all devices
    microbatches: int = 24  # parts of the batch, one after the other; each has noise
    mc_samples: int = 1  # of IVON for each part
    block: int = 1024  # tokens in a sequence
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    remat: int = 0  # 1: keep the layers' inputs alone for the backward pass
    ivon_lr: float = 0.3
    ivon_ess: float = 1e10
    ivon_hess_init: float = 1e-3
    ivon_b1: float = 0.9
    ivon_b2: float = 0.99999
    ivon_clip_radius: float = 1e-3
    ivon_weight_decay: float = 1e-6
    adamw_lr: float = 6e-4
    adamw_b1: float = 0.9
    adamw_b2: float = 0.95
    adamw_weight_decay: float = 0.1
    max_norm: float = 1.0  # of gradients, for both
    seed: int = 0
    mesh: str = ""  # such as data=4,fsdp=2,model=2; otherwise all devices are data
    noise: str = "shared"  # one sample a step, or one for each "replica": data index
    eval_every: int = 1000  # steps
    eval_batches: int = 20
    num_samples: int = 16  # of the posterior, for the table
    checkpoint_every: int = 1000  # steps
    max_to_keep: int = 2  # checkpoints
    checkpoint_dir: str = "checkpoints/gpt2"
    plot: str = "gpt2.png"
    prompt: str = "def "
    write: int = 200  # tokens to write after the prompt
    distributed: str = ""  # "auto", or HOST:PORT of the first
    num_processes: int = 1
    process_id: int = 0
    cpu_devices: int = 0  # simulate so many in this process
    heartbeat_seconds: int = 100  # how long a lost process may go unnoticed


def parse_args(args=None):
    """Return the Config of the command line; a flag overrides what the size says."""
    parser = argparse.ArgumentParser(description="Train GPT-2 with IVON or AdamW.")
    for field in dataclasses.fields(Config):
        parser.add_argument(
            f"--{field.name}",
            type=field.type,
            default=argparse.SUPPRESS,
            choices=CHOICES.get(field.name),
        )
    given = vars(parser.parse_args(args))
    config = Config(**PRESETS[given.get("size", Config.size)] | given)
    for name, value in dataclasses.asdict(config).items():
        check = check_text if isinstance(value, str) else check_number
        if fault := check(name, value):
            shown = repr(value) if isinstance(value, str) else value
            parser.error(f"--{name} {fault}, got {shown}.")
    if config.process_id >= config.num_processes:
        parser.error(
            f"--process_id must be below --num_processes {config.num_processes}, got "
            f"{config.process_id}."
        )
    return config


def check_number(name, value):
    """Say what is wrong with a number as int32 or float32, or nothing."""
    if isinstance(value, int):
        least, most = LEAST.get(name, 1), 1 if name == "remat" else 2**31 - 1
        if not least <= value <= most:
            return f"must be at {f'least {least}' if value < least else f'most {most}'}"
        return None
    with np.errstate(over="ignore"):
        number = np.float32(value)
    faults = {
        "must be a finite number": not math.isfinite(number),
        "must be at least 0": value < 0,
        "must be positive": name in POSITIVE and not number > 0,
        "must be below 1": name in BELOW_ONE and not number < 1,
    }
    return next((fault for fault, is_true in faults.items() if is_true), None)


def check_text(name, text):
    """Say what is wrong with a text, or nothing."""
    if name in ("prompt", "checkpoint_dir") and not text:
        return "must not be empty"
    if name == "distributed" and text not in ("", "auto"):
        host, _, port = text.rpartition(":")
        if not (host and port.isdecimal()):
            return "must be auto or HOST:PORT, such as localhost:1234"
    return check_picture(pathlib.Path(text)) if name == "plot" else None


def check_picture(path):
    """Try to write where the picture will be, and leave no trace."""
    if path.suffix.lower() not in PICTURES:
        return f"must end in {', '.join(PICTURES)}"
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(1024))
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        return f"must be writable ({error.strerror})"
    return None
