"""A run, read top to bottom: data, state, steps, checkpoints, evaluation, report.

Everything that a step needs is a function of (config, step): the batch, its augmentation, the learning rate. So a run
that was killed goes on from its newest checkpoint as if nothing had happened.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from clip_jax import data, provenance
from clip_jax.config import Architecture, Config, Resolved, WeightsConfig, differences, name_of, resolve
from clip_jax.devices import distributed, sharding
from clip_jax.devices.chips import chip_of
from clip_jax.devices.distributed import Preempted, PreemptionMonitor
from clip_jax.evals import benchmark
from clip_jax.evals.datasets import LOADERS
from clip_jax.evals.embed import CachedEmbedder, ModelEmbedder
from clip_jax.evals.report.tables import text_table
from clip_jax.evals.report.writing import write_report
from clip_jax.evals.suite import REGISTRY, Loader, Suite, load_suite
from clip_jax.interop import positions, reading
from clip_jax.interop.msgpack import write as write_weights
from clip_jax.models import Model
from clip_jax.models.flops import training_flops
from clip_jax.preprocess import preprocess_many
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training import metrics, optim, step, workdir
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.step import TrainState
from clip_jax.typing import DataSource, HostBatch, Params, Tokenizer

log = logging.getLogger(__name__)

# By what tokenizers differ: merges, case, punctuation, entities, other scripts.
_SAMPLES = (
    "a photo of a dog",
    "The QUICK brown fox, jumps: over 13 lazy dogs!",
    "Motörhead &amp; 東京タワー 🦊 in the snow",
)

# Metrics are read this many steps late, so that the device never waits for the host to ask.
_LAG = 2


class NonFiniteError(RuntimeError):
    """Too many steps in a row gave a loss or a gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    resolved: Resolved
    mesh: Mesh
    source: DataSource
    tokenizer: Tokenizer
    model: Model
    optimizer: optax.GradientTransformation
    workdir: epath.Path
    preemption: PreemptionMonitor

    @property
    def config(self) -> Config:
        return self.resolved.config


def train(config: Config, directory: str, export: str | None = None) -> bool:
    """Train, evaluate, report and export as `config` says, going on from what `directory` holds.

    Args:
      export: where the weights are written as msgpack.

    Returns:
      True if the run is finished; False if it was asked to leave, with its state saved.

    Raises:
      ValueError: for a config, data or a directory that don't fit, before the first step.
      NonFiniteError, SaveFailed: the newest checkpoint stands.
    """
    run = prepare(config, epath.Path(directory).expanduser())
    try:
        checkpoints = Checkpoints(
            run.workdir / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every_steps=config.checkpoint.keep_every_steps,
        )
        state = _first_or_saved_state(run, checkpoints)
        suite = load_suite(config.eval, config.data, _eval_sets(config))
        _steps(run, state, checkpoints, suite)
        _finish(run, checkpoints, suite, export)
    except Preempted:
        return False
    checkpoints.close()
    return True


def _eval_sets(config: Config) -> dict[str, Loader]:
    """Return what loads a split of each source, the registry's sets among them."""
    return LOADERS | {REGISTRY: lambda _, name: benchmark.eval_set(name, config.eval.data_dir)}


def prepare(config: Config, directory: epath.Path) -> Run:
    """Check everything that can be checked, on all hosts, before anything costs time."""
    source = data.make_source(config.data)
    tokenizer = make_tokenizer(config.tokenizer, config.model.text)
    resolved = resolve(config, devices=jax.device_count(), processes=jax.process_count(), examples=len(source))
    versions = provenance.versions()
    distributed.check_equal_on_all_processes(
        {
            "config": str(config),
            "code": versions["git_commit"] + versions["jax"],
            "training data": source.fingerprint(),
        }
    )
    if distributed.is_main_process():
        workdir.describe(directory, config)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    optimizer = optim.make_optimizer(config.optim, resolved.total_steps, seed=config.train.seed)
    model = step.model_from_config(config, mesh)
    return Run(resolved, mesh, source, tokenizer, model, optimizer, directory, PreemptionMonitor())


def _first_or_saved_state(run: Run, checkpoints: Checkpoints) -> TrainState:
    """Return the newest saved state, or the initial one: a function of the seed, equal on every host."""
    restored = checkpoints.restore(_like(run))
    if restored is None:
        state = _initial_state(run)
        if distributed.is_main_process():
            # Without means and deviations: a host doesn't hold the parameters that `fsdp` cuts over others.
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            log.info("%s\n%s", name_of(run.config.model), overview)
        return state
    state, info = restored
    if info["training_data"] != run.source.fingerprint():
        raise ValueError(
            f"the training data is not what {run.workdir} was trained on: fingerprint {run.source.fingerprint()} here,"
            f" {info['training_data']} there. Give back the shards that were there, or use another --workdir"
        )
    log.info("going on from the checkpoint of step %d", int(state.step))
    return state


def _initial_state(run: Run) -> TrainState:
    if not run.config.init.weights:
        return _initialiser(run)(jax.random.key(run.config.train.seed))
    params = starting_weights(run.config)
    if "logit_scale" not in params:  # one tower
        params = jax.jit(run.model.init)(jax.random.key(run.config.train.seed)) | params
    start = functools.partial(step.init_state, optimizer=run.optimizer, config=run.config.optim)
    return jax.jit(start, out_shardings=_placed(run))(params)


def starting_weights(config: Config) -> Params:
    """Return the parameters that `init.weights` names, their positions resized to the run's sizes.

    They are those of one tower where it says so: 'lit.npz:img'.

    Raises:
      ValueError: if there is no such file, or its model or pixels are not the run's, naming each key that differs.
    """
    init, model = config.init, config.model
    path, tower = reading.split_tower(init.weights)
    try:
        if tower:
            log.info("starting from the %s tower of %s", tower, path)
            return reading.read_tower(path, tower, model)
        weights = reading.read(init.weights, model=init.model, activation=init.activation)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"init.weights={init.weights!r}: {error}") from error
    size, length = model.image.image_size, model.text.length
    found, params = positions.resize(weights.config.model, weights.params, image_size=size, length=length)
    spec = dataclasses.replace(weights.config.preprocess, implementation=config.preprocess.implementation)
    theirs = dataclasses.replace(config, model=found, preprocess=spec)
    _check_same(theirs, config, f"init.weights={init.weights!r} has another model or other pixels")
    log.info("starting from %s (%s)", init.weights, weights.format)
    return params


def teaching_weights(config: Config, tokenizer: Tokenizer) -> tuple[Architecture, Params]:
    """Return the model that `teacher.weights` names and its parameters, positions resized to the run's sizes.

    Args:
      tokenizer: the run's. Where the teacher's came with its weights, both have to make the same of a few texts.

    Raises:
      ValueError: if there is no such file, or its pixels or token ids are not the run's, naming what differs.
    """
    teacher, model = config.teacher, config.model
    said = f"teacher.weights={teacher.weights!r}"
    if reading.split_tower(teacher.weights)[1]:
        raise ValueError(f"{said} is one tower, and a teacher needs both: leave out what follows the colon")
    try:
        weights = reading.read(teacher.weights, model=teacher.model, activation=teacher.activation)
        size, length = model.image.image_size, model.text.length
        found, params = positions.resize(weights.config.model, weights.params, image_size=size, length=length)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{said}: {error}") from error
    text = dataclasses.replace(model.text, vocab_size=found.text.vocab_size, eos_id=found.text.eos_id)
    theirs = dataclasses.replace(
        config,
        model=dataclasses.replace(model, text=text),
        preprocess=dataclasses.replace(weights.config.preprocess, implementation=config.preprocess.implementation),
        tokenizer=dataclasses.replace(weights.config.tokenizer, path=config.tokenizer.path),
    )
    _check_same(theirs, config, f"{said} has other pixels or token ids")
    if weights.config.tokenizer.name == "clip_bpe" or weights.config.tokenizer_file:
        own = make_tokenizer(weights.config.tokenizer, found.text, tokenizer_file=weights.config.tokenizer_file)
        for sample in _SAMPLES:
            there, here = (make([sample])[0].tolist() for make in (own, tokenizer))
            if there != here:
                raise ValueError(f"{said} has other token ids than this run: {sample!r} is {there} there, {here} here")
    log.info("learning from %s (%s)", teacher.weights, weights.format)
    return found, params


def _check_same(theirs: Config, ours: Config, said: str) -> None:
    differ = differences(theirs, ours)
    if differ:
        keys = "; ".join(f"{key} is {there!r} there, {here!r} here" for key, (there, here) in differ.items())
        raise ValueError(f"{said} than this run: {keys}")


def _teacher(run: Run) -> step.Teacher | None:
    if not run.config.teacher.weights:
        return None
    architecture, params = teaching_weights(run.config, run.tokenizer)
    return step.make_teacher(architecture, params, run.config, run.mesh)


def _initialiser(run: Run) -> Callable[[jax.Array], TrainState]:
    return jax.jit(
        lambda key: step.init_state(run.model.init(key), run.optimizer, run.config.optim),
        out_shardings=_placed(run),
    )


def _placed(run: Run) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, _like(run))


def _like(run: Run) -> TrainState:
    """Return the state's shapes, dtypes and shardings."""
    return step.abstract_state(run.model, run.optimizer, run.config, run.mesh)


def _pair_seconds(config: Config, devices: Sequence[Any]) -> float:
    """Return the time that a pair's model flops take on all devices at their peak; 0 where that isn't known."""
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return 0.0
    return training_flops(config.model, optim.frozen_towers(config.model, config.optim.freeze)) / (
        chip.flops_per_second * len(devices) / chip.devices
    )


def _steps(run: Run, state: TrainState, checkpoints: Checkpoints, suite: Suite) -> None:
    """Take the remaining steps; save, measure and tell on the way."""
    config, total = run.config, run.resolved.total_steps
    first = int(state.step)
    if first == total:
        return
    main = distributed.is_main_process()
    writer = metrics.Writer(run.workdir, first_step=first, active=main)
    progress = metrics.Progress(first, total, active=main)
    meter = metrics.Meter(config.train.batch_size, _pair_seconds(config, jax.devices()))
    schedule = optim.make_schedule(config.optim, total)
    teacher = _teacher(run)
    train_step = step.make_train_step(run.model, run.optimizer, config, run.mesh, teacher)
    late: collections.deque[dict] = collections.deque()
    replaced = 0

    def save(at: int) -> None:
        checkpoints.save(
            at, state, {"training_data": run.source.fingerprint(), "examples": at * config.train.batch_size}
        )

    for at, host_batch in zip(range(first + 1, total + 1), _batches(run, first, meter), strict=False):
        state, outputs = train_step(state, sharding.to_global(host_batch.batch, run.mesh))
        replaced += len(host_batch.replaced)

        late.append(outputs)
        while len(late) > (0 if at % config.train.log_every_steps == 0 or at == total else _LAG):
            _count(meter, late.popleft(), config)
        if at % config.train.log_every_steps == 0 or at == total:
            record = meter.flush() | {"learning_rate": float(schedule(at - 1)), "replaced_records": float(replaced)}
            writer.write(at, record)
            progress.show(at, record)

        checkpoints.poll()
        if at % config.checkpoint.every_steps == 0 or at == total:
            save(at)
        try:
            run.preemption.check()
            if config.eval.every_steps and at % config.eval.every_steps == 0 and at < total:
                began = time.monotonic()
                writer.write(at, suite.evaluate(_embedder(run, state.eval_params)))
                meter.pause(time.monotonic() - began)
        except Preempted:
            progress.end()
            save(at)
            checkpoints.close()
            writer.close()
            log.warning("asked to leave: step %d is saved; the same command goes on from there", at)
            raise
    progress.end()
    checkpoints.wait()
    writer.close()


def _batches(run: Run, first: int, meter: metrics.Meter) -> Iterator[HostBatch]:
    """Yield the host's batches from step `first` on, and count the time that each was waited for."""
    batches = data.batches(
        run.source,
        run.tokenizer,
        run.config.data,
        image_size=run.config.model.image.image_size,
        batch_size=run.config.train.batch_size,
        seed=run.config.train.seed,
        start_step=first,
        rows=sharding.host_rows(run.mesh, run.config.train.batch_size),
    )
    while True:
        began = time.monotonic()
        batch = next(batches)
        meter.wait(time.monotonic() - began)
        yield batch


def _count(meter: metrics.Meter, outputs: dict[str, jax.Array], config: Config) -> None:
    values = {name: float(value) for name, value in jax.device_get(outputs).items()}
    if values["consecutive_skipped_steps"]:
        log.warning("a step was skipped: loss %s, gradient norm %s", values["loss"], values["grad_norm"])
    if values["consecutive_skipped_steps"] >= config.train.max_nonfinite_steps:
        raise NonFiniteError(
            f"{config.train.max_nonfinite_steps} steps in a row were not finite (loss {values['loss']}, gradient norm"
            f" {values['grad_norm']}); none of them changed the parameters. Lower optim.learning_rate or"
            " optim.b2 (0.95), or raise train.max_nonfinite_steps"
        )
    meter.add(values)


def _finish(run: Run, checkpoints: Checkpoints, suite: Suite, export: str | None) -> None:
    """Measure the checkpoint as it lies on disk; write report and weights."""
    state, _ = checkpoints.restore(_like(run))
    params = state.eval_params  # on all hosts, for it may compute
    embedder = CachedEmbedder(_embedder(run, params))
    measured = suite.evaluate(embedder)
    panels = suite.panels(embedder)
    whole = sharding.gather(params, run.mesh) if export else None
    if distributed.is_main_process():
        if run.config.eval.baselines_split:
            fitted_on = LOADERS[run.config.data.source](run.config.data, run.config.eval.baselines_split)
            measured |= suite.baselines(fitted_on)
        measured |= suite.thresholds(run.config.eval)
        described = {
            "attribution": suite.attribution,
            "config": dataclasses.asdict(run.config),
            "versions": provenance.versions(),
            "skipped": suite.skipped,
        }
        write_report(run.workdir, measured, metrics.read_lines(run.workdir), panels, described)
        print(text_table(measured))
        for name, reason in suite.skipped.items():
            print(f"{name} is left out: {reason}")
        if export:
            write_weights(export, whole, _weights_config(run))
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
    )


def _weights_config(run: Run) -> WeightsConfig:
    config = run.config
    return WeightsConfig(config.model, config.tokenizer, config.preprocess, source=f"clip_jax run {run.workdir.name}")
