"""Text report of a plan: memory, work, speed, and the config changes that help most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clip_jax.config import name_of
from clip_jax.planner.predict import Plan
from clip_jax.typing import Number

IMAGES_PER_CORE_SECOND = 865  # 512 px JPEG to 224 px, data.decode = "fast": docs/performance.md
RESOURCES = {
    "compute": "compute",
    "hbm": "HBM bandwidth",
    "interconnect": "the interconnect (ICI or NVLink)",
    "network": "the data center network",
}


def render_page(plan: Plan) -> str:
    parts = [_title(plan), _memory(plan)]
    if plan.flops:
        parts += [_work(plan), _speed(plan)]
    return "\n\n".join("\n".join(lines) for lines in (*parts, _advice(plan)))


def _title(plan: Plan) -> Iterator[str]:
    topology, config = plan.topology, plan.config
    shape = f" ({'x'.join(map(str, topology.shape))})" if topology.shape else ""
    slices = f" in {topology.slices} slices" if topology.slices > 1 else ""
    yield f"{topology.name}: {topology.chips:,} chips of {topology.chip.name}{shape}{slices}"
    if config is None:
        yield plan.program
        return
    data = topology.devices_per_slice // config.mesh.fsdp // config.mesh.tensor
    train = config.train
    batch = f"global batch {plan.global_batch:,}, {plan.global_batch / topology.chips:g} per chip"
    yield f"{name_of(config.model)}, {plan.program}: {batch};"
    axis = f"slice {topology.slices}, " if topology.slices > 1 else ""
    yield f"mesh {axis}data {data}, fsdp {config.mesh.fsdp}, tensor {config.mesh.tensor}; remat {train.remat},"
    yield f"{train.micro_batches} micro-batch(es), text_capacity {train.text_capacity:g}, optimizer {config.optim.name}"
    yield from (f"{tower} attention: {how}" for tower, how in plan.attention.items())
    how = ""
    if train.dtype == "float32":
        passes = "six bfloat16 passes" if topology.chip.kind == "tpu" else "without TF32 and tensor cores"
        how = f", {passes}: {_si(topology.chip.float32_flops_per_second, 'FLOP/s')}"
    yield f"matmul precision: {plan.matmul_precision}{how}"


def _memory(plan: Plan) -> Iterator[str]:
    capacity = plan.topology.chip.hbm_bytes
    if not plan.fits:
        ratio = plan.needed_bytes / capacity
        yield f"DOES NOT FIT: needs {_bytes(plan.needed_bytes)}, {ratio:.2f} times the {_bytes(capacity)} of a chip"
    else:
        free = capacity - plan.peak_bytes
        yield f"FITS: peak {_bytes(plan.peak_bytes)} of {_bytes(capacity)} per chip, {free / capacity:.0%} free"
    all_live = plan.argument_bytes + plan.temporary_bytes <= plan.peak_bytes
    rows = [
        ("parameters", plan.parameter_bytes),
        ("optimizer state, EMA", plan.optimizer_bytes),
        ("batch", plan.batch_bytes),
        ("temporaries" if all_live else "temporaries (not all live at once)", plan.temporary_bytes),
        ("  saved activations", plan.activation_bytes),
    ]
    yield from _table([(name, _bytes(size)) for name, size in rows if size])


def _work(plan: Plan) -> Iterator[str]:
    chip, milliseconds = plan.topology.chip, {name: f"{1e3 * t:.3g} ms" for name, t in plan.seconds.items()}
    yield "One step on one chip:"
    ratio = f", {plan.flops / plan.model_flops:.2f} times the model's" if plan.model_flops else ""
    slowdown = plan.bf16_equivalent_flops / plan.flops
    passes = f", {slowdown:.2f} times the time of bfloat16" if slowdown > 1.005 else ""
    padding = plan.hbm_bytes_padded / plan.hbm_bytes - 1
    flops = f"{_si(plan.flops, 'FLOP')}{ratio}{passes}, at {_si(chip.flops_per_second, 'FLOP/s')}"
    hbm_rate, link_rate = _bytes(chip.hbm_bytes_per_second), _bytes(chip.link_bytes_per_second)
    rows = [
        ("matmuls", milliseconds["compute"], flops),
        ("HBM", milliseconds["hbm"], f"{_bytes(plan.hbm_bytes_padded)}, {padding:.1%} tile padding, at {hbm_rate}/s"),
        ("interconnect", milliseconds["interconnect"], f"{_bytes(plan.interconnect_bytes)} sent, at {link_rate}/s"),
    ]
    if plan.network_bytes:
        rate = _bytes(chip.network_bytes_per_second)
        rows.append(("network", milliseconds["network"], f"{_bytes(plan.network_bytes)} sent, at {rate}/s"))
    matmuls, hbm, *sent = _table(rows)
    yield from (matmuls, hbm)
    if plan.hbm_bytes_by_source:
        largest = sorted(plan.hbm_bytes_by_source.items(), key=lambda item: -item[1])[:5]
        yield "    " + ", ".join(f"{name} {_bytes(size)}" for name, size in largest)
    yield from sent
    for group in plan.collectives:
        sizes = [_bytes(group["interconnect_bytes"])] if group["interconnect_bytes"] or group["slices"] == 1 else []
        if group["slices"] > 1:
            sizes.append(f"{_bytes(group['network_bytes'])} between {group['slices']} slices")
        yield f"    {group['count']:,.0f} x {group['kind']} of {group['group']} devices: {', '.join(sizes)}"


def _speed(plan: Plan) -> Iterator[str]:
    """Yield speeds, from full overlap of the resources to no overlap."""
    (fast, slow), rates, chips = plan.step_seconds, plan.images_per_second, plan.topology.chips
    yield f"Bound by {RESOURCES[plan.bound_by]}. From full overlap to no overlap of these resources:"
    rows = [
        ("step", f"{1e3 * fast:,.3g} to {1e3 * slow:,.3g} ms"),
        ("MFU", "{:.2f} to {:.2f}".format(*plan.mfu)),
        ("images/s", f"{rates[0]:,.0f} to {rates[1]:,.0f} per chip, at most {chips * rates[0]:,.0f} on all chips"),
    ]
    if plan.config is not None:
        hosts = max(1, chips // plan.topology.chip.chips_per_host)
        per_host = rates[0] * chips / hosts
        cores = per_host / IMAGES_PER_CORE_SECOND
        rows += [
            ("input", f"at most {per_host:,.0f} images/s on each of {hosts:,} hosts: {cores:,.0f} CPU cores"),
            (f"{plan.total_steps:,} steps", _durations(plan.days)),
            ("", "{:,.0f} to {:,.0f} chip-hours".format(*plan.chip_hours)),
        ]
    yield from _table(rows)


def _advice(plan: Plan) -> Iterator[str]:
    """Yield the config changes to try first, and the limits of the figures."""
    if plan.config is not None:
        changes = list(_faster(plan) if plan.fits else _smaller(plan))
        yield from (f"Try {change}" for change in changes)
        if not changes:
            yield _no_change(plan)
    if plan.flops and plan.traced_flops and abs(plan.flops / plan.traced_flops - 1) > 0.005:
        both = f"JAX's trace has {_si(plan.traced_flops, 'FLOP')}, the program {_si(plan.flops, 'FLOP')}"
        if plan.flops < plan.traced_flops:
            yield f"The compiler saves matmuls: {both}."
        else:
            yield f"Warning: {both}: the compiler rematerializes to fit, or pads small batches."
    if plan.config is not None:
        yield "MFU counts every position of both towers, as published figures do, including positions that are skipped."
    if plan.unknown_trip_counts:
        yield f"Warning: loops of unknown trip count are counted once: {', '.join(plan.unknown_trip_counts)}."
    if plan.topology.chip.kind == "gpu":
        yield "Not compiled: lower bounds of memory, FLOPs and bytes. Temporaries come on top."
    elif plan.fits:
        yield "Times are roofline bounds from datasheets; the inside of kernels and fusions is not modeled."


def _smaller(plan: Plan) -> Iterator[str]:
    """Yield changes that save memory, the least expensive in time first."""
    config, devices = plan.config, plan.topology.chips * plan.topology.chip.devices
    train = config.train
    if train.remat not in ("names", "full"):
        yield "--config.train.remat=names: recomputes everything but attention."
    if train.remat == "names" and config.model.image.attention_shape:
        yield "--config.train.remat=full: recomputes attention, too."
    if config.mesh.fsdp == 1 and devices > 1:
        yield f"{_fsdp_flag(plan)}: shards parameters and moments over all chips of a slice."
    rows, micro_batches = train.batch_size // (devices // config.mesh.tensor), train.micro_batches
    if rows % (2 * micro_batches) == 0:
        yield f"--config.train.micro_batches={2 * micro_batches}: half the activations, one more forward pass."
    else:
        yield "a larger slice: the micro-batches per chip are small already."


def _faster(plan: Plan) -> Iterator[str]:
    """Yield changes that relieve the slowest resource, or use free memory."""
    config, capacity = plan.config, plan.topology.chip.hbm_bytes
    train, bound, free = config.train, plan.bound_by, capacity - plan.peak_bytes
    if train.text_capacity >= 1 and config.model.text.supports_packing:
        yield "--config.train.text_capacity=0.35: skips the positions after the end token."
    idle = plan.seconds["hbm"] < 0.4 * plan.seconds["compute"] and free > 2 * plan.temporary_bytes
    if bound == "compute" and train.remat in ("names", "full") and idle:
        yield "--config.train.remat=dots: less recomputation; the saved activations fit."
    if bound == "hbm" and train.remat != "names" and config.model.image.attention_shape:
        yield "--config.train.remat=names: recomputes elementwise operations instead of reading their results."
    # An update reads and writes parameters, two moments and the gradient: about 3.5 times the optimizer state.
    update, replicated = 3.5 * plan.optimizer_bytes, config.mesh.fsdp == 1 and not config.optim.shard_moments
    if bound == "hbm" and replicated and update > 0.2 * plan.hbm_bytes_padded:
        yield "--config.optim.shard_moments=True: every chip updates its own shard of the parameters."
    if bound == "interconnect" and config.mesh.fsdp > 1:
        yield f"--config.mesh.fsdp={config.mesh.fsdp // 2}: fewer chips gather every layer."
    if bound == "network":
        yield "a larger batch: gradients cross between slices once per micro-batch, whatever its size."
    fewer = f"--config.train.micro_batches={train.micro_batches // 2}"
    state_bytes = plan.parameter_bytes + plan.optimizer_bytes
    if train.micro_batches > 1 and free > 1.2 * plan.activation_bytes:
        gain = "one forward pass less" if train.micro_batches == 2 else "half as many gradient reductions"
        yield f"{fewer}: {gain}, and the activations fit."
    elif train.micro_batches > 1 and replicated and free + state_bytes > 1.2 * plan.activation_bytes:
        yield f"{_fsdp_flag(plan)} {fewer}: sharded parameters leave room for larger micro-batches."
    if free > capacity / 2:
        yield f"a smaller slice or a larger batch: {free / capacity:.0%} of the memory is free."


def _fsdp_flag(plan: Plan) -> str:
    """Return the flag that shards parameters and moments over a whole slice."""
    return f"--config.mesh.fsdp={plan.topology.devices_per_slice // plan.config.mesh.tensor}"


def _no_change(plan: Plan) -> str:
    """Return the bottleneck of a plan that none of the changes improves."""
    if plan.bound_by == "hbm" and plan.hbm_bytes_by_source:
        name, size = max(plan.hbm_bytes_by_source.items(), key=lambda item: item[1])
        return f"No change to suggest: {size / plan.hbm_bytes_padded:.0%} of the HBM traffic is from {name}."
    ratio = plan.flops / plan.model_flops
    return f"No change to suggest: bound by {RESOURCES[plan.bound_by]}, {ratio:.2f} times the model's FLOPs."


def _durations(days: tuple[float, float]) -> str:
    """Return a range of durations in the largest unit that the shorter one fills."""
    units = (("days", 1), ("hours", 24), ("minutes", 24 * 60))
    unit, factor = next((unit for unit in units if days[0] * unit[1] >= 1), units[-1])
    return f"{days[0] * factor:,.2f} to {days[1] * factor:,.2f} {unit}"


def _bytes(size: Number) -> str:
    return _si(size, "B")


def _si(value: Number, unit: str) -> str:
    """Return a number with four digits and a decimal prefix, as in datasheets."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        yield "  " + "  ".join((*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last))
