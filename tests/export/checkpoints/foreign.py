"""Training checkpoints with classes that their reader does not have."""

import sys
import types
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch

MODULE = "humanmodelling_absent"


class _ForeignModule:
    """Makes `MODULE` importable while a checkpoint is written."""

    def __enter__(self) -> types.ModuleType:
        module = types.ModuleType(MODULE)
        source = (
            "class CreationArgs:\n"
            "    def __init__(self, **fields): self.__dict__.update(fields)\n"
            "class Encoder: pass\n"
            "class Attributes(dict): pass\n"
        )
        exec(compile(source, MODULE, "exec"), module.__dict__)
        for value in vars(module).values():
            if isinstance(value, type):
                value.__module__ = MODULE
        Size = namedtuple("Size", "width height", module=MODULE)
        vars(module)["Size"] = Size
        sys.modules[MODULE] = module
        return module

    def __exit__(self, *_: object) -> None:
        del sys.modules[MODULE]


def write_wham(path: Path, weights: Mapping[str, torch.Tensor], **model_spec: object) -> None:
    """A Lightning checkpoint as WHAM's: foreign instances and classes, optimizer state, tied head."""
    with _ForeignModule() as foreign:
        arguments = foreign.CreationArgs(
            pl_class=foreign.Encoder,
            pl_checkpoint_path=PurePosixPath("/data/encoder.ckpt"),
            pl_kwargs={"vqgan": {"ch_mult": [1, 2], "size": foreign.Size(8, 4)}, **model_spec},
        )
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
        optimizer.step()
        checkpoint = {
            "epoch": 3,
            "global_step": 200000,
            "pytorch-lightning_version": "1.9.0",
            "state_dict": weights,
            "optimizer_states": [optimizer.state_dict()],
            "hparams_name": "kwargs",
            "hyper_parameters": foreign.Attributes(
                context_encoder_args={"images": arguments}, variant={"n": 2}
            ),
        }
        torch.save(checkpoint, path)
