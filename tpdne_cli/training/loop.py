"""The training loop: StyleGAN2 (Karras et al. 2020, arXiv 1912.04958) grown from low to high resolution."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tpdne_cli import devices
from tpdne_cli.errors import TrainingError
from tpdne_cli.files import write_atomic
from tpdne_cli.networks.discriminator import Discriminator, DiscriminatorConfig
from tpdne_cli.networks.stylegan2 import Config, Generator
from tpdne_cli.training import checkpoint, data, growth, losses, sheets
from tpdne_cli.training.augment import Ada, DiffAugment
from tpdne_cli.training.config import Stage, TrainConfig, parse_schedule
from tpdne_cli.training.precision import choose_dtype, tuned

LOG = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the caller hears every `log_every` steps, and what one line of the log holds."""

    images: int
    total: int
    resolution: int
    seconds: float
    images_per_second: float
    generator_loss: float
    discriminator_loss: float
    r1: float
    real_score: float
    fake_score: float
    r_t: float
    augment_p: float
    learning_rate: float


@dataclasses.dataclass
class Counters:
    """Where a run stands: photographs shown in all and in this stage, steps, place in the data's order.

    before: photographs that the weights it began with had seen; fresh_critic: but its critic had seen none.
    first: the resolution that the run began at.
    """

    before: int = 0
    fresh_critic: bool = False
    first: int = 0
    images: int = 0
    steps: int = 0
    stage: int = 0
    stage_images: int = 0
    position: int = 0
    seconds: float = 0.0


def train(
    config: TrainConfig,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    resume: bool = False,
) -> Path:
    """Trains until `config.images` photographs were shown, or until `should_stop` says so, and leaves a checkpoint.

    With `resume`, goes on from the newest checkpoint in `config.run_dir`; on a CPU the result is bit for bit that of
    a run never stopped. Returns the path of the checkpoint. Raises TrainingError, DeviceError.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run_dir = Path(config.run_dir)
    if not resume and checkpoint.exists(run_dir):
        raise TrainingError(f"{run_dir} holds a run already; go on with --resume or choose another folder.")
    run_dir.mkdir(parents=True, exist_ok=True)
    device = devices.choose(config.device)
    used = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(used), tuned(device):  # the caller's random numbers stay as they were
            run = Run(config, checkpoint.load(run_dir) if resume else None)
            for progress in run.until(should_stop):
                on_progress(progress)
            return run.save()
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        raise TrainingError(
            f"There is not enough memory on {device} for batches of {config.batch} pictures: "
            "give a smaller --batch, with --resume where the run has begun."
        ) from None


class Run:
    """A run in memory: networks, optimisers, counters. `until` moves it, `save` stores it."""

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.device = devices.choose(config.device)
        self.dtype = choose_dtype(config.precision, self.device, (state or {}).get("dtype"))
        self.stages = parse_schedule(config.schedule)
        self.counters = Counters()
        self.augment = self._augmentation()
        if state is None:
            torch.manual_seed(config.seed)
            resolution = self.stages[0].resolution
            begun = growth.from_file(Path(config.from_model), resolution) if config.from_model else None
            nets = begun or growth.build(config, resolution)
            if config.freeze_critic and nets.fresh_critic:
                raise TrainingError(f"{config.from_model} has no critic beside it that could be frozen.")
            self.counters = Counters(nets.images_before, nets.fresh_critic, resolution)
            self._adopt(nets)
        else:
            self._restore(state)
        self._enter_stage()

    @property
    def stage(self) -> Stage:
        """The stage of growth the run is in."""
        return self.stages[self.counters.stage]

    def until(self, should_stop: Callable[[], bool]) -> Iterator[Progress]:
        """Steps until the end, yielding what the log gets; stores checkpoints by the clock on the way."""
        saved = started = time.monotonic()
        seconds_before = self.counters.seconds
        since, since_images = started, self.counters.images
        while self.counters.images < self.config.images and not should_stop():
            if self.stage.images is not None and self.counters.stage_images >= self.stage.images:
                if self.counters.stage + 1 == len(self.stages):
                    return
                self.save()  # what grows wrong can be tried again
                self._grow()
            self.step()
            now = time.monotonic()
            self.counters.seconds = seconds_before + now - started
            if self.counters.steps % self.config.log_every == 0:
                speed = (self.counters.images - since_images) / max(now - since, 1e-9)
                yield self._log(speed)
                since, since_images = time.monotonic(), self.counters.images
            if now - saved >= self.config.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
                since += saved - now

    def step(self) -> None:
        """One batch: both losses, the critic's R1 penalty every `r1_every` steps, moving average.

        Generator and critic learn from one and the same answer of the critic, neither from the other's newest step: a
        forward pass less than taking turns.
        """
        behind = self.counters.stage > 0 or self.counters.fresh_critic  # the critic, for a while
        catching_up = behind and self.counters.stage_images < self.config.critic_head_start
        reals = self._next_reals()
        real_logits = self._critic_on_reals(reals)
        with torch.set_grad_enabled(not catching_up):
            fakes = self._generate()
        self._both_on_fakes(fakes)
        self._apply(self.d_optimizer)
        self._watch_overfitting(real_logits)
        if self.counters.steps % self.config.r1_every == 0:
            self._step_r1(reals)
        if not catching_up:
            self._apply(self.g_optimizer)
            self._step_average()
        self.counters.steps += 1
        self.counters.images += self.config.batch
        self.counters.stage_images += self.config.batch

    def save(self) -> Path:
        """Writes checkpoint and sample sheet."""
        for name, net in (("generator", self.nets.generator), ("critic", self.nets.discriminator)):
            if not all(p.isfinite().all() for p in net.parameters()):
                raise TrainingError(f"The {name} holds values that are not numbers: --resume with a lower rate.")
        path = checkpoint.save(self.run_dir, self._state())
        sheets.write(self.nets.ema, self.run_dir / f"samples-{self.counters.images:08d}.png")
        return path

    def _next_reals(self) -> torch.Tensor:
        indices, self.counters.position = data.batch_indices(
            len(self.pictures), self.config.batch, self.config.seed, self.counters.position, self.device
        )
        reals = data.to_float(self.pictures[indices])
        if self.config.mirror:
            flip = torch.rand(len(reals), 1, 1, 1, device=self.device) < 0.5
            reals = torch.where(flip, reals.flip(3), reals)
        return reals.contiguous(memory_format=torch.channels_last)

    def _generate(self) -> torch.Tensor:
        g, n = self.nets.generator, self.config.batch
        z = torch.randn(2 * n, g.config.z_dim, device=self.device)
        ws, other = g.mapping(z, None).chunk(2)  # [N, num_ws, w_dim]
        g.mapping.w_avg.lerp_(ws[:, 0].detach().mean(dim=0), 0.002)
        # Style mixing: from a random layer on, the styles of a second latent (section 3.1 of arXiv 1812.04948).
        crossover = torch.randint(1, g.num_ws, (n, 1, 1), device=self.device)
        mixed = torch.rand(n, 1, 1, device=self.device) < self.config.style_mixing
        layer = torch.arange(g.num_ws, device=self.device).view(1, -1, 1)
        images: torch.Tensor = self._synthesis(torch.where(mixed & (layer >= crossover), other, ws), noise="random")
        return images

    def _critic_on_reals(self, reals: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._critic(self.augment(reals))
        loss = losses.real_loss(logits)
        loss.backward()  # type: ignore[no-untyped-call]
        self._note("real_loss", loss)
        self._note("real_score", logits.mean())
        return logits.detach()

    def _both_on_fakes(self, fakes: torch.Tensor) -> None:
        """Gradients of the critic and, where `fakes` have a history, of the generator."""
        logits = self._critic(self.augment(fakes))
        loss = losses.fake_loss(logits)
        learning = [p for p in self.nets.discriminator.parameters() if p.requires_grad]
        loss.backward(inputs=learning, retain_graph=fakes.requires_grad)  # type: ignore[no-untyped-call]
        self._note("fake_loss", loss)
        self._note("fake_score", logits.mean())
        if fakes.requires_grad:
            loss = losses.generator_loss(logits)
            loss.backward(inputs=list(self.nets.generator.parameters()))  # type: ignore[no-untyped-call]
            self._note("generator_loss", loss)

    def _watch_overfitting(self, real_logits: torch.Tensor) -> None:
        r_t = real_logits.sign().mean()  # section 3.1 of arXiv 2006.06676
        if isinstance(self.augment, Ada):
            self.augment.update(r_t, self.config.batch)
        self._note("r_t", r_t)

    def _step_r1(self, reals: torch.Tensor) -> None:
        critic = self.nets.discriminator
        gamma = self.config.gamma
        if gamma is None:
            gamma = losses.default_gamma(self.stage.resolution, self.config.batch)
        penalty = losses.r1_penalty(lambda x: critic(self.augment(x)), reals)
        (penalty * (gamma / 2 * self.config.r1_every)).backward()  # type: ignore[no-untyped-call]
        self._apply(self.d_optimizer)
        self._note("r1", penalty)

    def _step_average(self) -> None:
        seen = self.counters.before + self.counters.images
        half_life = min(self.config.ema_images, max(seen, 1) * self.config.ema_rampup)
        keep = 0.5 ** (self.config.batch / max(half_life, 1e-8))
        average, current = self.nets.ema, self.nets.generator
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - keep)
            for old, new in zip(average.buffers(), current.buffers(), strict=True):
                old.copy_(new)

    @staticmethod
    def _apply(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _adopt(self, nets: growth.Networks) -> None:
        """Takes networks as its own: device, layout, precision, optimisers."""
        for net in (nets.generator, nets.ema, nets.discriminator):
            net.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for half in (nets.generator.synthesis, nets.ema.synthesis, nets.discriminator):
            half.set_precision(self.dtype)
        self.nets = nets
        group = nets.discriminator.config.mbstd_group_size
        if group and self.config.batch > group and self.config.batch % group:
            raise TrainingError(
                f"The critic compares images in groups of {group}: a batch of {self.config.batch} has a rest."
            )
        for i in range(self.config.freeze_critic):  # Mo et al. 2020, arXiv 2002.10964
            nets.discriminator.get_submodule(f"b{self.counters.first >> i}").requires_grad_(False)
        lr, lazy = self.config.learning_rate, self.config.r1_every / (self.config.r1_every + 1)
        fused = self.device.type in ("cpu", "cuda")
        self.g_optimizer = torch.optim.Adam(nets.generator.parameters(), lr, (0.0, 0.99), fused=fused)
        # Section B of 1912.04958: as if the lazy penalty were a part of every step.
        self.d_optimizer = torch.optim.Adam(nets.discriminator.parameters(), lr * lazy, (0.0, 0.99**lazy), fused=fused)
        if self.config.compile and hasattr(torch._functorch.config, "donated_buffer"):  # from torch 2.5 on
            torch._functorch.config.donated_buffer = False  # the critic's graph is gone through twice
        self._synthesis = torch.compile(nets.generator.synthesis) if self.config.compile else nets.generator.synthesis
        self._critic = torch.compile(nets.discriminator) if self.config.compile else nets.discriminator

    def _grow(self) -> None:
        old, g_optimizer, d_optimizer = self.nets, self.g_optimizer, self.d_optimizer
        self.counters.stage += 1
        self.counters.stage_images = 0
        self._adopt(growth.grow(old))
        growth.carry_moments(old.generator, g_optimizer, self.nets.generator, self.g_optimizer)
        growth.carry_moments(old.discriminator, d_optimizer, self.nets.discriminator, self.d_optimizer)
        self._enter_stage()

    def _enter_stage(self) -> None:
        pictures = data.load_images(self.config.data, self.stage.resolution, self.stages[-1].resolution)
        self.pictures = pictures.to(self.device)
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}

    def _augmentation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.config.augment == "ada":
            return Ada(self.device, self.config.ada_target, self.config.ada_images)
        if self.config.augment == "diffaugment":
            return DiffAugment(self.config.augment_strength)
        return lambda x: x

    def _state(self) -> dict[str, Any]:
        nets = self.nets
        return {
            "version": 1,
            "config": self.config.to_json(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "counters": dataclasses.asdict(self.counters),
            "generator_config": dataclasses.asdict(nets.generator.config),
            "discriminator_config": dataclasses.asdict(nets.discriminator.config),
            "generator": nets.generator.state_dict(),
            "ema": nets.ema.state_dict(),
            "discriminator": nets.discriminator.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "ada": self.augment.state() if isinstance(self.augment, Ada) else None,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.counters = Counters(**state["counters"])
        self.counters.first = self.counters.first or self.stages[0].resolution  # older checkpoints do not say
        resolution = state["generator_config"]["resolution"]
        stages = {stage.resolution: index for index, stage in enumerate(self.stages)}
        if resolution not in stages:
            raise TrainingError(
                f"The run stands at {resolution} px, which the schedule {self.config.schedule} does not have."
            )
        self.counters.stage = stages[resolution]
        nets = growth.Networks(
            Generator(Config(**state["generator_config"])),
            Generator(Config(**state["generator_config"])).eval().requires_grad_(False),
            Discriminator(DiscriminatorConfig(**state["discriminator_config"])),
        )
        nets.generator.load_state_dict(state["generator"])
        nets.ema.load_state_dict(state["ema"])
        nets.discriminator.load_state_dict(state["discriminator"])
        self._adopt(nets)
        for optimizer, stored in ((self.g_optimizer, "g_optimizer"), (self.d_optimizer, "d_optimizer")):
            for group, own in zip(state[stored]["param_groups"], optimizer.param_groups, strict=True):
                # The learning rate is this run's, so that it can be changed at --resume; and so is 'fused', by which
                # torch decides on which device the steps are counted.
                group.update({k: v for k, v in own.items() if k != "params"})
            optimizer.load_state_dict(state[stored])
        if isinstance(self.augment, Ada) and state.get("ada"):
            self.augment.restore(state["ada"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self._cut_log()

    def _cut_log(self) -> None:
        """Forget what a run that was killed had logged behind its checkpoint: those images come again."""
        log = self.run_dir / LOG
        if log.exists():
            lines = log.read_text().splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["images"] <= self.counters.images
            ]
            if kept != lines:
                write_atomic(log, "".join(kept).encode())

    def _note(self, name: str, value: torch.Tensor) -> None:
        total, count = self._sums.get(name, (torch.zeros((), device=self.device), 0))
        self._sums[name] = (total + value.detach(), count + 1)

    def _log(self, speed: float) -> Progress:
        means = {name: (total / count).item() for name, (total, count) in self._sums.items()}
        self._sums = {}
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingError(
                f"The losses stopped being numbers at {self.counters.images} images: --resume with a lower rate."
            )
        progress = Progress(
            images=self.counters.images,
            total=self.config.images,
            resolution=self.stage.resolution,
            seconds=round(self.counters.seconds, 1),
            images_per_second=round(speed, 2),
            generator_loss=means.get("generator_loss", math.nan),
            discriminator_loss=means["real_loss"] + means["fake_loss"],
            r1=means.get("r1", math.nan),
            real_score=means["real_score"],
            fake_score=means["fake_score"],
            r_t=means["r_t"],
            augment_p=self.augment.p.item() if isinstance(self.augment, Ada) else 0.0,
            learning_rate=self.config.learning_rate,
        )
        with (self.run_dir / LOG).open("a") as log:
            log.write(json.dumps(_without_nan(dataclasses.asdict(progress))) + "\n")
        return progress


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
