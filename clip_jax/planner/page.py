"""A plan as one page that a person can decide from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clip_jax.config import name_of
from clip_jax.devices.chips import Number
from clip_jax.planner.predict import Plan

IMAGES_PER_CORE_SECOND = 254  # decoded, cropped and resized by tf.data from 512 px JPEG: docs/performance.md
RESOURCES = {"flops": "matrix units", "hbm": "HBM", "links": "links between chips", "network": "data centre network"}


def page(plan: Plan) -> str:
    """Return the page."""
    parts = [_title(plan), _memory(plan)]
    if plan.flops:
        parts += [_work(plan), _speed(plan)]
    return "\n\n".join("\n".join(lines) for lines in (*parts, _advice(plan)))


def _title(plan: Plan) -> Iterator[str]:
    where, config = plan.topology, plan.config
    shape = f" ({'x'.join(map(str, where.shape))})" if where.shape else ""
    slices = f" in {where.slices} slices" if where.slices > 1 else ""
    yield f"{where.name}: {where.chips:,} chips of {where.chip.name}{shape}{slices}"
    if config is None:
        yield plan.what
        return
    data = where.devices_per_slice // config.mesh.fsdp // config.mesh.tensor
    train = config.train
    rows = f"batch {plan.global_batch:,}, {plan.global_batch / where.chips:g} a chip"
    yield f"{name_of(config.model)}, {plan.what}: {rows};"
    axis = f"slice {where.slices}, " if where.slices > 1 else ""
    yield f"mesh {axis}data {data}, fsdp {config.mesh.fsdp}, tensor {config.mesh.tensor}; remat {train.remat},"
    yield f"{train.micro_batches} micro-batch(es), text_capacity {train.text_capacity:g}, optimizer {config.optim.name}"


def _memory(plan: Plan) -> Iterator[str]:
    room = plan.topology.chip.hbm_bytes
    if not plan.fits:
        times = plan.needed_bytes / room
        yield f"DOES NOT FIT: {_bytes(plan.needed_bytes)} needed of {_bytes(room)} a chip, {times:.2f} times as much"
    else:
        free = room - plan.peak_bytes
        yield f"FITS: {_bytes(plan.peak_bytes)} of {_bytes(room)} a chip at the peak, {free / room:.0%} free"
    at_once = plan.argument_bytes + plan.temporary_bytes <= plan.peak_bytes
    rows = [
        ("parameters", plan.parameter_bytes),
        ("optimizer, averages", plan.optimizer_bytes),
        ("batch", plan.batch_bytes),
        ("temporaries, all told" if at_once else "temporaries, not all at once", plan.temporary_bytes),
        ("  saved activations", plan.activation_bytes),
    ]
    yield from _table([(name, _bytes(size)) for name, size in rows if size])


def _work(plan: Plan) -> Iterator[str]:
    chip, milliseconds = plan.topology.chip, {name: f"{1e3 * t:.3g} ms" for name, t in plan.seconds.items()}
    yield "A step on a chip:"
    again = f", {plan.flops / plan.model_flops:.2f} times the model's" if plan.model_flops else ""
    slower = plan.unit_flops / plan.flops
    passes = f", {slower:.2f} times as long as in bfloat16" if slower > 1.005 else ""
    padding = plan.hbm_bytes_padded / plan.hbm_bytes - 1
    rows = [
        (
            *("matrix units", milliseconds["flops"]),
            f"{_si(plan.flops, 'FLOP')}{again}{passes}, at {_si(chip.flops_per_second, 'FLOP/s')}",
        ),
        (
            *("HBM", milliseconds["hbm"]),
            f"{_bytes(plan.hbm_bytes_padded)}, {padding:.1%} of it padding, at {_bytes(chip.hbm_bytes_per_second)}/s",
        ),
        (*("links", milliseconds["links"]), f"{_bytes(plan.link_bytes)} at {_bytes(chip.link_bytes_per_second)}/s"),
    ]
    if plan.network_bytes:
        rate = _bytes(chip.network_bytes_per_second)
        rows.append(("network", milliseconds["network"], f"{_bytes(plan.network_bytes)} at {rate}/s"))
    units, memory, *between = _table(rows)
    yield from (units, memory)
    if plan.hbm_bytes_by_source:
        largest = sorted(plan.hbm_bytes_by_source.items(), key=lambda item: -item[1])[:5]
        yield "    " + ", ".join(f"{name} {_bytes(size)}" for name, size in largest)
    yield from between
    for sent in plan.collectives:
        network = f", {_bytes(sent['network_bytes'])} between {sent['slices']} slices" if sent["slices"] > 1 else ""
        count = f"{sent['count']:,.0f} x {sent['kind']} of {sent['group']} devices"
        links = _bytes(sent["link_bytes"]) if sent["link_bytes"] or not network else ""
        yield f"    {count}: {links}{network if links else network.removeprefix(', ')}"


def _speed(plan: Plan) -> Iterator[str]:
    """Yield what follows, from everything at once to one thing after another."""
    (fast, slow), rates, chips = plan.step_seconds, plan.images_per_second, plan.topology.chips
    yield f"Bound by {RESOURCES[plan.bound_by]}. If all work at once, or one after another:"
    rows = [
        ("a step", f"{1e3 * fast:,.3g} to {1e3 * slow:,.3g} ms"),
        ("MFU", "{:.2f} to {:.2f}".format(*plan.mfu)),
        ("pairs a second", f"{rates[0]:,.0f} to {rates[1]:,.0f} a chip, {chips * rates[0]:,.0f} at most in all"),
    ]
    if plan.config is not None:
        hosts = max(1, chips // plan.topology.chip.chips_per_host)
        of_host = [rate * chips / hosts for rate in rates]
        cores = of_host[0] / IMAGES_PER_CORE_SECOND
        days, hours = plan.days, plan.chip_hours
        rows += [
            ("input", f"{of_host[0]:,.0f} pictures a second at most from each of {hosts:,} hosts: {cores:,.0f} cores"),
            (f"{plan.total_steps:,} steps", f"{days[0]:,.2f} to {days[1]:,.2f} days"),
            ("", f"{hours[0]:,.0f} to {hours[1]:,.0f} chip-hours"),
        ]
    yield from _table(rows)


def _advice(plan: Plan) -> Iterator[str]:
    """Yield what to change first, and what not to believe."""
    if plan.config is not None:
        changes = list(_faster(plan) if plan.fits else _smaller(plan))
        yield from (f"Try {change}" for change in changes)
        if not changes:
            yield _reason(plan)
    if plan.flops and plan.traced_flops and abs(plan.flops / plan.traced_flops - 1) > 0.005:
        both = f"JAX's trace has {_si(plan.traced_flops, 'FLOP')}, the program {_si(plan.flops, 'FLOP')}"
        less = plan.flops < plan.traced_flops
        more = "some are computed again to fit, or are padding of small batches"
        yield f"The compiler saves products: {both}." if less else f"Beware: {both}: {more}."
    if plan.config is not None:
        yield "MFU counts every position of both towers, as published figures do; those that are never computed too."
    if plan.endless_loops:
        yield f"Beware: counted once, for want of a constant number of rounds: {', '.join(plan.endless_loops)}."
    if plan.topology.chip.kind == "gpu":
        yield "Not compiled: what must be held, moved and sent at least. Temporaries come on top."
    elif plan.fits:
        yield "Bounds by the datasheet, not times: what happens inside a kernel or a fusion is not in them."


def _smaller(plan: Plan) -> Iterator[str]:
    """Yield what makes a program smaller, the cheapest in time first."""
    config, devices = plan.config, plan.topology.chips * plan.topology.chip.devices
    train = config.train
    if train.remat not in ("names", "full"):
        yield "--config.train.remat=names: all but attention is computed again."
    if train.remat == "names" and config.model.image.kind == "vit":
        yield "--config.train.remat=full: attention is computed again too."
    if config.mesh.fsdp == 1 and devices > 1:
        yield f"{_fsdp(plan)}: parameters and moments are cut over all chips of a slice."
    rows, parts = train.batch_size // (devices // config.mesh.tensor), train.micro_batches
    if rows % (2 * parts) == 0:
        yield f"--config.train.micro_batches={2 * parts}: half the activations, one more forward pass."
    else:
        yield "a larger slice: a chip has few rows already."


def _faster(plan: Plan) -> Iterator[str]:
    """Yield what makes the slowest resource's work less, and what is left unused."""
    config, capacity = plan.config, plan.topology.chip.hbm_bytes
    train, bound, free = config.train, plan.bound_by, capacity - plan.peak_bytes
    if train.text_capacity >= 1 and config.model.text.causal and config.model.text.pool == "end":
        yield "--config.train.text_capacity=0.35: positions behind the end token cost nothing."
    idle = plan.seconds["hbm"] < 0.4 * plan.seconds["flops"] and free > 2 * plan.temporary_bytes
    if bound == "flops" and train.remat in ("names", "full") and idle:
        yield "--config.train.remat=dots: less is computed again, and there is room to keep it."
    if bound == "hbm" and train.remat != "names" and config.model.image.kind == "vit":
        yield "--config.train.remat=names: what is cheap is computed again instead of read back."
    # An update reads and writes parameters, two moments and the gradient: about 3.5 times what the optimizer holds.
    update, whole = 3.5 * plan.optimizer_bytes, config.mesh.fsdp == 1 and not config.optim.shard_moments
    if bound == "hbm" and whole and update > 0.2 * plan.hbm_bytes_padded:
        yield "--config.optim.shard_moments=True: every chip updates its own part of the parameters."
    if bound == "links" and config.mesh.fsdp > 1:
        yield f"--config.mesh.fsdp={config.mesh.fsdp // 2}: fewer chips gather every layer."
    if bound == "network":
        yield "a larger batch: gradients cross between slices once for each part of it, whatever its size."
    parts = train.micro_batches
    fewer = f"--config.train.micro_batches={parts // 2}"
    if parts > 1 and free > 1.2 * plan.activation_bytes:
        less = "one forward pass less" if parts == 2 else "gradients are added up and sent half as often"
        yield f"{fewer}: {less}, and there is room."
    elif parts > 1 and whole and free + plan.parameter_bytes + plan.optimizer_bytes > 1.2 * plan.activation_bytes:
        yield f"{_fsdp(plan)} {fewer}: parameters, cut over a slice, leave room for larger parts."
    if free > capacity / 2:
        yield f"a smaller slice or a larger batch: {free / capacity:.0%} of the memory is free."


def _fsdp(plan: Plan) -> str:
    """Return the flag that cuts parameters and moments as finely as a slice can."""
    return f"--config.mesh.fsdp={plan.topology.devices_per_slice // plan.config.mesh.tensor}"


def _reason(plan: Plan) -> str:
    """Return where the time goes, for a plan that none of the known changes makes faster."""
    if plan.bound_by == "hbm" and plan.hbm_bytes_by_source:
        name, size = max(plan.hbm_bytes_by_source.items(), key=lambda item: item[1])
        return f"Nothing to change first: most goes through HBM for {name}, {size / plan.hbm_bytes_padded:.0%}."
    again = plan.flops / plan.model_flops
    return f"Nothing to change first: bound by {RESOURCES[plan.bound_by]}, {again:.2f} times the model's flops."


def _bytes(size: Number) -> str:
    return _si(size, "B")


def _si(value: Number, unit: str) -> str:
    """Return a number with four digits and a decimal prefix, as datasheets have it."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        yield "  " + "  ".join((*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last))
