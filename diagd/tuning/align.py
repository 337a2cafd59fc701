"""Alignment fine-tuning: training on exactly the inputs and visibility a schedule gives at inference.

The recipe of arXiv 2503.14070, section 3.3, with mask and row seeds taken from the schedule tables, and
several schedules mixed in each batch, so that one model serves them all.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from diagd.bundle.files import atomic_file
from diagd.bundle.targets import file_target
from diagd.errors import QualityError, UsageError
from diagd.export.transformer import Transformer
from diagd.progress import started
from diagd.tuning.options import AlignOptions, check_device
from diagd.tuning.teacher_forcing import ForcedBatch, ForcedPasses, Logits, forced_loss, forced_nll

_PATIENCE: Final = timedelta(days=1)
"""Others wait for the first one while it fits a tokenizer."""


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this one is; they see the same batches that one alone would.

    ``rank`` counts from 0 up to ``size``; ``device`` is that of this one.
    """

    rank: int
    size: int
    device: str

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, which has the gradients of all of them where it is run by this."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def share(self, windows: int) -> slice:
        """Its part of the windows of a step; UsageError: there are fewer windows than ranks."""
        if windows < self.size:
            raise UsageError(f"{windows} windows of a step for {self.size} processes; raise --batch")
        return slice(self.rank, None, self.size)

    def batch(
        self, passes: ForcedPasses, windows: NDArray[np.int64], choice: NDArray[np.int64]
    ) -> tuple[ForcedBatch, float]:
        """Its windows of a batch int64 [B, N], each by its schedule [B], and what their loss counts for.

        The mean over ranks of weighted losses is the mean over all tokens, however many each rank scores.

        Raises:
            UsageError: there are fewer windows than ranks.
        """
        mine, scored = self.share(len(windows)), passes.scored[choice]
        weight = self.size * float(scored[mine].sum() / scored.sum())
        return passes.batch(windows[mine], choice[mine].tolist(), self.device), weight

    def mean(self, loss: Tensor) -> float:
        """The mean of a value over all."""
        if self.size == 1:
            return loss.item()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        return total.item() / self.size

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def together(device: str, meeting: str | None = None) -> Iterator[Ranks]:
    """Be one of the processes that torchrun started, or stand alone; ``cuda`` is a GPU for each.

    Within another of its kind it goes on with that one: processes that part may miss each other next time.
    ``meeting`` is where they find each other, which torchrun tells.
    """
    if started() == 1:
        yield Ranks(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend, rank = "nccl" if device.startswith("cuda") else "gloo", int(os.environ["RANK"])
    if distributed.is_initialized():
        yield Ranks(rank, started(), device)
        return
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=started(), timeout=_PATIENCE
    )
    try:
        yield Ranks(rank, started(), device)
        # Gloo's threads let go of a step's tensors a little later, which aborts a process that ends meanwhile
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def check_resume(resume: Path | None, names: Iterable[str] = ("",)) -> None:
    """Find out before any work whether trainings of these names can be kept.

    Raises:
        UsageError: something else is there, or nothing can be written.
    """
    if resume is not None:
        for name in names:
            file_target(beside(resume, name), (), "--set resume", begins=b"PK")


def beside(path: Path, name: str) -> Path:
    """The file of one of several trainings."""
    return path.with_name(f"{path.name}.{name}") if name else path


def check_converges(loss: float, step: int) -> None:
    """Refuse (QualityError) to go on where the loss of a step is no finite number: no later one will be."""
    if not math.isfinite(loss):
        raise QualityError(
            f"the loss of step {step} is {loss}: training diverged, and its weights are not written; lower "
            "the learning rate (--rate, or what it is called there), or start from other weights"
        )


class TrainingState:
    """What is trained on data and its optimiser, kept in the file ``options.resume`` if that is named.

    What a step draws depends on its number alone, so a training that was resumed gives the same weights. All
    ``ranks`` read the file, the first one writes it.
    """

    def __init__(
        self,
        options: AlignOptions,
        data: Sequence[NDArray[np.generic]],
        trained: Sequence[nn.Parameter],
        ranks: Ranks,
    ) -> None:
        self._options, self._trained, self._ranks = options, trained, ranks
        self._path, self._writes = options.resume, ranks.is_first
        self._optimiser = torch.optim.AdamW(trained, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0)
        shape = [tuple(parameter.shape) for parameter in trained]
        digest = hashlib.sha256(
            repr((replace(options, device="", resume=None, keep_every=1), shape)).encode()
        )
        for array in data:
            digest.update(np.ascontiguousarray(array).tobytes())
        self._identity = digest.hexdigest()

    def descend(self, loss: Callable[[int], Tensor], report: Report | None = None) -> None:
        """Take the steps that are left; ``loss`` is of a step, from 0, by its number alone.

        Raises:
            UsageError: the file is of another training.
            QualityError: training diverges.
        """
        options = self._options
        for step in range(self._resumed(), options.steps):
            value, progress = loss(step), (step + 1) / options.steps
            self._optimiser.zero_grad(set_to_none=True)
            value.backward()
            ramp = min(20 * progress, (1 - progress) / 0.95)
            self._optimiser.param_groups[0]["lr"] = options.rate * ramp
            self._optimiser.step()
            mean = self._ranks.mean(value)
            check_converges(mean, step + 1)
            self._write(step + 1)
            if report is not None:
                report(step + 1, mean)

    def _resumed(self) -> int:
        """Be as when the file was written; gives the steps that were done."""
        if self._path is None or not self._path.exists():
            return 0
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
            identity, step = state["identity"], int(state["step"])
        except Exception as error:  # PyTorch raises many types for bytes that are something else
            reason = str(error) or "it is empty"  # EOFError says nothing
            raise UsageError(f"{self._path} is no training that was kept: {reason}; remove it") from error
        if identity != self._identity:
            raise UsageError(
                f"{self._path} is of a training with other options or data; repeat its command, or remove it"
            )
        with torch.no_grad():
            for parameter, value in zip(self._trained, state["trained"], strict=True):
                parameter.copy_(value)
        self._optimiser.load_state_dict(state["optimiser"])
        return step

    def _write(self, step: int) -> None:
        """Write the file, once in so many steps and at the last."""
        every, last = self._options.keep_every, self._options.steps
        if self._path is None or not self._writes or (step % every and step != last):
            return
        state = {
            "identity": self._identity,
            "step": step,
            "trained": [parameter.detach().cpu() for parameter in self._trained],
            "optimiser": self._optimiser.state_dict(),
        }
        with atomic_file(self._path) as partial, partial.open("wb") as file:
            torch.save(state, file)  # given a path, it has errors of its own for a full disk

    def remove(self) -> None:
        """The training is done."""
        if self._path is not None and self._writes:
            self._path.unlink(missing_ok=True)


Report = Callable[[int, float], None]
"""Called after each step with its number, from 1, and its loss in nats per token."""


@dataclass
class Validation:
    """Windows int64 [N, tokens] that are not trained on, and what they cost.

    Attributes:
        likelihoods: mean negative log-likelihood by schedule, nats a token, before training and after.
    """

    streams: NDArray[np.int64]
    likelihoods: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, logits: Logits, passes: ForcedPasses, device: str) -> None:
        """Note the likelihood under each schedule."""
        for choice, name in enumerate(passes.names):
            found = forced_nll(logits, passes, self.streams, choice, device=device)
            self.likelihoods.setdefault(name, []).append(float(np.nanmean(found)))


class LowRank(nn.Module):
    """weight + a @ b, with a random and b zero at first; the weight alone while it is not ``enabled``."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        factor = torch.empty(rows, rank).normal_(std=rows**-0.5, generator=generator)
        self.a = nn.Parameter(factor.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rank, columns, device=weight.device))
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight."""
        return weight + self.a @ self.b if self.enabled else weight


def align(
    model: Transformer,
    streams: NDArray[np.int64],
    options: AlignOptions,
    report: Report | None = None,
    *,
    text: NDArray[np.float32] | None = None,
    frozen: Collection[str] = (),
    valid: Validation | None = None,
) -> Transformer:
    """Fine-tune ``model`` in place and return it; processes of torchrun share every batch, and all return it.

    ``streams`` int64 [N, frames * frame_length (+ prefix)] are windows of known videos, ``text`` float32 [n,
    width] is filled up with zeros as at inference. ``report`` is told about every step, ``valid`` measured
    before and after; parameters named in ``frozen`` stay as they are.

    Raises:
        UsageError: the text does not fit the model, or there is no such device; see also ``Mixture``.
        QualityError: training diverges.
    """
    mixture = Mixture(model, streams, options)
    check_device(options.device)
    with together(options.device) as ranks:
        model.to(ranks.device).train()
        trained = add_low_rank(model, options) if options.rank else _all_but(model, frozen)
        filled = filled_text(model, text, ranks.device)
        state = TrainingState(options, [streams], trained, ranks)
        if valid is not None:
            valid.measure(partial(model, text=filled), mixture.passes, ranks.device)
        logits = partial(ranks.wrapped(model), text=filled)

        def loss(step: int) -> Tensor:
            picked, choice = mixture.draw(step)
            batch, weight = ranks.batch(mixture.passes, streams[picked], choice)
            return weight * forced_loss(logits, batch, autocast=options.autocast)

        state.descend(loss, report)
        if valid is not None:
            valid.measure(partial(model, text=filled), mixture.passes, ranks.device)
    state.remove()
    return merged(model)


class Mixture:
    """Windows int64 [N, tokens], and the shares of schedules that they are trained by; see ``ForcedPasses``.

    Raises:
        UsageError: there is no schedule, or the windows are no whole number of at least 2 frames that the
            model can hold.
    """

    def __init__(
        self, model: Transformer, streams: NDArray[np.int64], options: AlignOptions, prompt: int = 1
    ) -> None:
        if not options.shares or min(share for share, _ in options.shares) <= 0:
            raise UsageError("alignment needs at least one schedule, each with a share above 0")
        layout, most = model.config.layout, model.config.context_frames
        frames, rest = divmod(streams.shape[1] - layout.prefix, layout.frame_length)
        if rest or not 2 <= frames <= most:
            raise UsageError(
                f"windows of {streams.shape[1]} tokens; expected {layout.prefix} + n * {layout.frame_length} "
                f"with n from 2 to {most}, the frames of the model's context"
            )
        shares = np.array([share for share, _ in options.shares])
        self.passes = ForcedPasses([each for _, each in options.shares], int(frames), prompt=prompt)
        self._chances, self._count, self._options = shares / shares.sum(), len(streams), options

    def draw(self, step: int, *, twice: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which windows a step takes, or twice as many, and the schedule of each.

        By its number alone, so that a run can be resumed.
        """
        size = self._options.batch * (1 + twice)
        random = np.random.default_rng((self._options.seed, step))
        picked = random.integers(self._count, size=size)
        return picked, random.choice(len(self._chances), size, p=self._chances)


def _all_but(model: Transformer, frozen: Collection[str]) -> list[nn.Parameter]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in frozen
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def filled_text(model: Transformer, text: NDArray[np.float32] | None, device: str) -> Tensor | None:
    """Text embeddings as the model reads them: filled up with zeros.

    Raises:
        UsageError: they do not fit the model.
    """
    shape = model.config.text
    if shape is None and text is None:
        return None
    if shape is None or text is None or text.shape[1:] != (shape.width,) or len(text) > shape.length:
        wanted = f"[n, {shape.width}] with n up to {shape.length}" if shape else "no text"
        seen = "none" if text is None else list(text.shape)
        raise UsageError(f"text embeddings: {seen}; this model takes {wanted}; give --set text=FILE")
    filled = torch.zeros(shape.length, shape.width)
    filled[: len(text)] = torch.from_numpy(text)
    return filled.to(device)


def add_low_rank(model: Transformer, options: AlignOptions) -> list[nn.Parameter]:
    """Freeze the model and give every matrix of its blocks a low-rank update; returns what is trained."""
    generator = torch.Generator().manual_seed(options.seed)
    model.requires_grad_(requires_grad=False)
    trained: list[nn.Parameter] = []
    blocks = [(module, module.named_parameters(recurse=False)) for module in model.layers.modules()]
    matrices = [(module, name) for module, own in blocks for name, matrix in own if matrix.dim() == 2]
    for module, name in matrices:
        update = LowRank(getattr(module, name), options.rank, generator)
        parametrize.register_parametrization(module, name, update)
        trained += [update.a, update.b]
    return trained


@contextmanager
def without_low_rank(model: Transformer) -> Iterator[None]:
    """The model as it was before its low-rank updates."""
    updates = [module for module in model.modules() if isinstance(module, LowRank)]
    for update in updates:
        update.enabled = False
    try:
        yield
    finally:
        for update in updates:
            update.enabled = True


def merged(model: Transformer) -> Transformer:
    """The model behind its training, its low-rank updates part of the weights."""
    for module in list(model.layers.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(requires_grad=True)
    return model.eval()
