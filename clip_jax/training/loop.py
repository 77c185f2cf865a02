"""Training loop: prepare, initial or restored state, steps with checkpoints and evaluation, final report and export.

The batch, its augmentation and the learning rate of a step are functions of (config, step). A run that is killed and
restarted computes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from clip_jax import data, provenance
from clip_jax.config import Config, WeightsConfig, check_local_paths, data_notes, name_of, resolve
from clip_jax.devices import chips, distributed, sharding
from clip_jax.devices.distributed import Preempted, PreemptionMonitor
from clip_jax.evals.embed import CachedEmbedder, ModelEmbedder
from clip_jax.evals.load import LoadOptions, load_dataset
from clip_jax.evals.report.tables import text_table
from clip_jax.evals.report.writing import write_report
from clip_jax.evals.suite import Suite, load_suite
from clip_jax.evals.validation import Validation, load_validation
from clip_jax.interop.msgpack import write as write_weights
from clip_jax.models import Model, attention_implementations
from clip_jax.models.flops import training_flops
from clip_jax.preprocess import preprocess_many
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training import extension, initialization, metrics, optim, step, workdir
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.follow import REPORT
from clip_jax.training.startup import StartUp
from clip_jax.training.step import TrainState
from clip_jax.typing import Batch, DataSource, EvalDataset, HostBatch, Params, Tokenizer, Unavailable

log = logging.getLogger(__name__)

_ATTEMPTS = 3  # maximum number of times that the last checkpoint may be damaged on disk and trained again


@dataclasses.dataclass(frozen=True)
class Run:
    """Constants of a run, equal in every step."""

    config: Config
    total_steps: int
    mesh: Mesh
    source: DataSource
    validation: Validation
    tokenizer: Tokenizer
    model: Model
    optimizer: optax.GradientTransformation
    workdir: epath.Path
    preemption: PreemptionMonitor

    @property
    def info(self) -> dict[str, Any]:
        """Data and length of the run, as stored in checkpoints."""
        return extension.run_info(self.source.fingerprint(), len(self.source), self.total_steps)


def train(
    config: Config, directory: str, export: str | None = None, *, extend: bool = False, started: float | None = None
) -> bool:
    """Train, evaluate, write the report and export the weights; resumes from the checkpoints in `directory`.

    Args:
      directory: workdir of the run, a local path or a URL that all hosts can reach.
      export: msgpack file for the final weights, a local path or a URL.
      extend: the data of the run may have changed since its checkpoint, by more shards.
      started: time.monotonic() at the start of the process, for the log; now by default.

    Returns:
      True if the run is finished; False if it was preempted (SIGTERM), with its state saved.

    Raises:
      ValueError: config, data or an output path do not fit. Raised before the first step.
      NonFiniteError: too many consecutive steps without a finite loss; the newest checkpoint is intact.
      SaveFailed: a checkpoint could not be written; earlier ones are intact.
      RuntimeError: every checkpoint is damaged.
    """
    with StartUp(started or time.monotonic()) as start_up:
        return _train(config, directory, export, extend, start_up)


def _train(config: Config, directory: str, export: str | None, extend: bool, start_up: StartUp) -> bool:
    run = prepare(config, workdir.to_path(directory, "--workdir"), export)
    start_up.phase("data")
    keep, keep_every_steps = config.checkpoint.keep, config.checkpoint.keep_every_steps
    checkpoints = Checkpoints(run.workdir / workdir.CHECKPOINTS, keep=keep, keep_every_steps=keep_every_steps)
    try:
        suite = load_suite(config.eval, config.data)
        baselines_dataset = _load_baselines_dataset(config)  # before training, so that an error ends the run
        state, info = _restored_or_initial_state(run, checkpoints, extend)
        if distributed.is_main_process():
            workdir.write_config(run.workdir, config)
        for _ in range(_ATTEMPTS):
            if int(state.step) == run.total_steps:
                break
            start_up.phase("state")
            _train_steps(run, state, info, checkpoints, suite, start_up)
            # The checkpoint on disk is evaluated and exported. If it is damaged, an older one is restored here, and
            # the missing steps are trained again.
            state, info = _restored_or_initial_state(run, checkpoints)
        if int(state.step) < run.total_steps:
            raise RuntimeError(
                f"{run.workdir}: the checkpoint of step {run.total_steps} was damaged {_ATTEMPTS} times after it was"
                " saved; check the disk, or use another --workdir"
            )
        _finish(run, state.eval_params, suite, baselines_dataset, export)
    except Preempted:
        checkpoints.close()
        return False
    checkpoints.close()
    return True


def prepare(config: Config, directory: epath.Path, export: str | None = None) -> Run:
    """Check config, data, hosts and output paths before any expensive work."""
    check_local_paths(config)
    source = _open_source(config)
    tokenizer = make_tokenizer(config.tokenizer, config.model.text)
    devices, processes = jax.device_count(), jax.process_count()
    total_steps = resolve(config, devices=devices, processes=processes, examples=len(source)).total_steps
    versions = provenance.versions()
    code = versions["git_commit"] + versions["jax"]
    distributed.check_equal_on_all_processes(
        {"config": str(config), "code": code, "training data": source.fingerprint()}
    )
    with distributed.synchronized_errors(ValueError):
        if distributed.is_main_process():
            workdir.check_outputs(directory, export)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    architecture, seed = config.model, config.train.seed
    optimizer = optim.make_optimizer(config.optim, total_steps, architecture=architecture, seed=seed)
    model = step.model_from_config(config, mesh)
    if distributed.is_main_process():
        for note in data_notes(config, total_steps, len(source)):
            log.info(note)
        dtype, capacity = config.train.dtype, config.train.text_capacity
        attention = attention_implementations(config.model, mesh, dtype=dtype, text_capacity=capacity)
        for tower, implementation in attention.items():
            log.info("attention of the %s tower: %s", tower, implementation)
    validation, preemption = load_validation(source, config), PreemptionMonitor()
    return Run(config, total_steps, mesh, source, validation, tokenizer, model, optimizer, directory, preemption)


def _open_source(config: Config) -> data.DataSource:
    """Open the training data, first on the main process: it may index shards of a store for all."""
    source = None
    with distributed.synchronized_errors(ValueError, OSError):
        if distributed.is_main_process():
            source = data.make_source(config.data)
    return source or data.make_source(config.data)


def _load_baselines_dataset(config: Config) -> EvalDataset | None:
    name = config.eval.baselines_dataset
    if not name:
        return None
    try:
        return load_dataset(name, LoadOptions(config.eval.data_dir, data=config.data))
    except Unavailable as error:
        raise ValueError(f"eval.baselines_dataset={name!r}: {error}; '' for a run without baselines") from error


def _restored_or_initial_state(
    run: Run, checkpoints: Checkpoints, extend: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """Return the newest intact checkpoint and its info; without checkpoints the initial state and no info."""
    restored = checkpoints.restore(step.abstract_state(run.model, run.optimizer, run.config, run.mesh))
    if restored is None:
        state = initialization.initial_state(run.model, run.optimizer, run.config, run.mesh)
        if distributed.is_main_process():
            # Without statistics: a host does not hold the parameters that fsdp shards over other hosts.
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            log.info("%s\n%s", name_of(run.config.model), overview)
        return state, {}
    state, info = restored
    at = int(state.step)
    extension.check(info, run.info, at, workdir=str(run.workdir), extend=extend)
    if (notes := extension.notes(run.config, info, run.info, at)) and distributed.is_main_process():
        log.warning("\n".join(notes))
        if (report := run.workdir / REPORT).exists():  # its presence means that the run has finished
            report.rename(run.workdir / f"report_step_{at}.json")
    log.info("restored the checkpoint of step %d of %d", at, run.total_steps)
    return state, info


def _train_steps(
    run: Run, state: TrainState, info: dict[str, Any], checkpoints: Checkpoints, suite: Suite, start_up: StartUp
) -> None:
    """Train from `state` to the last step and save it. Raises Preempted with the state saved."""
    config, total_steps, first_step = run.config, run.total_steps, int(state.step)
    teacher = initialization.make_teacher(config, run.tokenizer, run.mesh)
    train_step = step.make_train_step(run.model, run.optimizer, config, run.mesh, teacher)
    activity = data.Activity()
    training_log = metrics.TrainingLog(
        run.workdir,
        config.train,
        optim.make_schedule(config.optim, total_steps),
        first_step=first_step,
        total_steps=total_steps,
        epoch_examples=len(run.source),
        pair_seconds=_pair_seconds(config, jax.devices()),
        saved=info.get("log"),
        data_rates=activity.rates,
        active=distributed.is_main_process(),
    )

    def save() -> None:
        saved = run.info | {"log": training_log.state()}
        at = int(state.step)
        checkpoints.save(at, state, saved | {"examples": at * config.train.batch_size})

    def evaluate(at: int) -> None:
        start = time.monotonic()
        embedder = _embedder(run, state.eval_params)
        results = suite.evaluate(embedder) | run.validation(embedder)
        training_log.add_evaluation(at, results, time.monotonic() - start)

    try:
        (evaluated,) = distributed.from_main_process(training_log.writer.has_evaluation(first_step))
        if _evaluation_is_due(run, first_step) and not evaluated:
            evaluate(first_step)  # the run was interrupted during this evaluation
            start_up.phase("evaluation")
        batches = _batches(run, first_step, training_log, activity)
        for at, (host_batch, batch) in zip(range(first_step + 1, total_steps + 1), batches, strict=False):
            start_up.phase("first batch")
            state, outputs = train_step(state, batch)
            start_up.finish("first step", outputs)
            training_log.add(at, outputs, len(host_batch.replaced), host_batch.filtered)
            checkpoints.poll()
            if at % config.checkpoint.every_steps == 0 or at == total_steps:
                save()
            run.preemption.check()
            if _evaluation_is_due(run, at):
                evaluate(at)
        checkpoints.wait()
    except Preempted:
        save()
        checkpoints.wait()
        log.warning("preempted: step %d is saved; the same command resumes from it", int(state.step))
        raise
    finally:
        training_log.close()


def _evaluation_is_due(run: Run, at: int) -> bool:
    """Return whether the config evaluates this step during training; the last step is evaluated for the report."""
    every_steps = run.config.eval.every_steps
    return bool(every_steps) and at % every_steps == 0 and 0 < at < run.total_steps


def _batches(
    run: Run, first_step: int, training_log: metrics.TrainingLog, activity: data.Activity
) -> Iterator[tuple[HostBatch, Batch]]:
    """Yield the batches after step `first_step`, as this host has read them and on the devices; log the waiting.

    The loop reads metrics two steps late, so a batch is copied while the devices compute the steps before. They hold
    at most three batches: of the last two steps, and the next.
    """
    batches = data.batches(
        run.source,
        run.tokenizer,
        run.config.data,
        image_size=run.config.model.image.image_size,
        batch_size=run.config.train.batch_size,
        seed=run.config.train.seed,
        start_step=first_step,
        rows=sharding.host_rows(run.mesh, run.config.train.batch_size),
        activity=activity,
    )
    while True:
        start = time.monotonic()
        host_batch = next(batches)
        read = time.monotonic()
        training_log.wait(read - start)
        batch = jax.block_until_ready(sharding.to_global(host_batch.batch, run.mesh))
        training_log.transfer(time.monotonic() - read)
        yield host_batch, batch


def _pair_seconds(config: Config, devices: Sequence[Any]) -> float:
    """Return the seconds per image-text pair at the devices' peak FLOP/s; 0 if it is unknown."""
    chip = chips.chip_of(devices[0].device_kind)
    if chip is None:
        return 0.0
    flops = training_flops(config.model, optim.frozen_towers(config.model, config.optim.freeze))
    return flops / (chip.flops_per_second * len(devices) / chip.devices)


def _finish(run: Run, params: Params, suite: Suite, baselines_dataset: EvalDataset | None, export: str | None) -> None:
    """Evaluate the final parameters, write the report and export the weights. Call it on all hosts."""
    embedder = _embedder(run, params)
    cached = CachedEmbedder(embedder)
    results = suite.evaluate(cached) | run.validation(embedder)
    panels = suite.panels(cached)
    gathered = sharding.gather(params, run.mesh) if export else None
    if distributed.is_main_process():
        if baselines_dataset is not None:
            results |= suite.baselines(baselines_dataset)
        results |= suite.thresholds(run.config.eval, results)
        description = {
            "attribution": suite.attribution,
            "config": dataclasses.asdict(run.config),
            "versions": provenance.versions(),
            "skipped": suite.skipped,
        }
        write_report(run.workdir, results, metrics.read_lines(run.workdir), panels, description)
        print(text_table(results))
        for name, reason in suite.skipped.items():
            print(f"{name} is skipped: {reason}")
        if export:
            weights = WeightsConfig(
                *(run.config.model, run.config.tokenizer, run.config.preprocess),
                source=f"clip_jax run {run.workdir.name}",
            )
            write_weights(workdir.to_path(export, "--export"), gathered, weights)
            log.info("weights written to %s", export)
    distributed.barrier("finished")


def _embedder(run: Run, params: Params) -> ModelEmbedder:
    model, devices = run.config.model, run.mesh.size
    batch_size = -(-run.config.eval.batch_size // devices) * devices
    return ModelEmbedder(
        run.model.encode_image,
        run.model.encode_text,
        params,
        run.tokenizer,
        functools.partial(preprocess_many, size=model.image.image_size, spec=run.config.preprocess),
        batch_size=batch_size,
        rows=sharding.host_rows(run.mesh, batch_size),
        put=functools.partial(sharding.to_global, mesh=run.mesh),
        out_sharding=sharding.replicated(run.mesh),
        on_batch=run.preemption.check,
        image_features=run.model.image_features,
    )
