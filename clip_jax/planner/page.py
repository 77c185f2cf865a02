"""A plan as one page that a person can decide from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clip_jax.architectures import name_of
from clip_jax.planner.predict import Plan

IMAGES_PER_CORE_SECOND = 254  # decoded, cropped and resized by tf.data from 512 px JPEG: docs/performance.md
RESOURCES = {"flops": "matrix units", "hbm": "HBM", "links": "links between chips", "network": "data centre network"}


def page(plan: Plan) -> str:
    """Return the page."""
    return "\n".join(
        [_title(plan), "", *_memory(plan), *(["", *_work(plan)] if plan.flops else []), "", *_advice(plan)]
    )


def _title(plan: Plan) -> str:
    where, config = plan.topology, plan.config
    shape = f" ({'x'.join(map(str, where.shape))})" if where.shape else ""
    machine = f"{where.chips} chips of {where.chip.name}{shape}" + (
        f" in {where.slices} slices" if where.slices > 1 else ""
    )
    lines = [f"{where.name}: {machine}", plan.what]
    if config is not None:
        mesh = {"data": where.chips * where.chip.devices // config.mesh.fsdp // config.mesh.tensor}
        mesh |= {"fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
        lines[1] = (
            f"{name_of(config.model)}, {plan.what}: batch {plan.global_batch:,}, {plan.global_batch / where.chips:g} a chip;"
            f" remat {config.train.remat}; {config.train.micro_batches} micro-batch(es); text_capacity"
            f" {config.train.text_capacity:g}; mesh {', '.join(f'{k} {v}' for k, v in mesh.items())}"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> Iterator[str]:
    room = plan.topology.chip.hbm_bytes
    if not plan.fits:
        yield f"DOES NOT FIT: {_giga(plan.needed_bytes)} needed, {_giga(room)} a chip: {plan.needed_bytes / room:.2f} times as much"
        return
    free = room - plan.peak_bytes
    yield f"FITS: {_giga(plan.peak_bytes)} of {_giga(room)} a chip at the peak, {_giga(free)} ({free / room:.0%}) free"
    rows = [
        ("parameters", plan.parameter_bytes),
        ("optimizer, averages", plan.optimizer_bytes),
        ("batch", plan.batch_bytes),
        ("temporaries, all told", plan.temporary_bytes),
        ("  saved activations", plan.activation_bytes),
    ]
    yield from _table([(name, _giga(size)) for name, size in rows if size])


def _work(plan: Plan) -> Iterator[str]:
    seconds, (fast, slow) = plan.seconds, plan.step_seconds
    chip = plan.topology.chip
    yield "A step, a chip:"
    rows = [
        (
            *("matrix units", f"{seconds['flops'] * 1e3:.1f} ms"),
            f"{plan.flops / 1e12:.2f} TFLOP of {chip.flops_per_second / 1e12:.0f} a second; the model's {plan.model_flops / 1e12:.2f}",
        ),
        (
            *("HBM", f"{seconds['hbm'] * 1e3:.1f} ms"),
            f"{_giga(plan.hbm_bytes_padded)} of {_giga(chip.hbm_bytes_per_second)} a second; {_giga(plan.hbm_bytes)} without padding",
        ),
        ("links", f"{seconds['links'] * 1e3:.1f} ms", f"{_giga(plan.link_bytes)}, {plan.hops:,.0f} messages in a row"),
    ]
    if plan.network_bytes:
        rows.append(
            ("network", f"{seconds['network'] * 1e3:.1f} ms", f"{_giga(plan.network_bytes)} between slices or hosts")
        )
    yield from _table(rows)
    for message in plan.collectives:
        where = "between slices" if message["crosses"] else "in a slice"
        yield (
            f"    {message['count']:,.0f} x {message['kind']} of {message['group']} devices, {where}: {_giga(message['bytes'])}"
        )
    if plan.hbm_bytes_by_source:
        largest = sorted(plan.hbm_bytes_by_source.items(), key=lambda item: -item[1])[:6]
        yield "    HBM by source: " + ", ".join(f"{name} {_giga(size)}" for name, size in largest)
    yield ""
    yield f"Bound by {RESOURCES[plan.bound_by]}. Everything at once, or one after another:"
    rates, mfu = plan.images_per_second, plan.mfu
    rows = [("a step", f"{fast * 1e3:,.0f} to {slow * 1e3:,.0f} ms"), ("MFU", f"{mfu[0]:.2f} to {mfu[1]:.2f}")]
    if plan.config is not None:
        hosts = max(1, plan.topology.chips // chip.chips_per_host)
        a_host = [rate * plan.topology.chips / hosts for rate in rates]
        rows += [
            (
                "pairs a second",
                f"{rates[0]:,.0f} to {rates[1]:,.0f} a chip, {rates[0] * plan.topology.chips:,.0f} at most in all",
            ),
            (
                *("input", f"{a_host[0]:,.0f} to {a_host[1]:,.0f} pictures a second from each of {hosts} hosts;"),
                f"{a_host[0] / IMAGES_PER_CORE_SECOND:,.0f} to {a_host[1] / IMAGES_PER_CORE_SECOND:,.0f} cores by tf.data",
            ),
        ]
        days = [plan.total_steps * t / 86_400 for t in (fast, slow)]
        hours = [day * 24 * plan.topology.chips for day in days]
        rows.append(
            (
                f"{plan.total_steps:,} steps",
                f"{days[0]:,.1f} to {days[1]:,.1f} days, {hours[0]:,.0f} to {hours[1]:,.0f} chip-hours",
            )
        )
    yield from _table(rows)


def _advice(plan: Plan) -> Iterator[str]:
    """Yield what to change first, and what not to believe."""
    config = plan.config
    if config is not None:
        changes = list(_room(plan) if not plan.fits else _speed(plan))
        yield from (f"Try {change}" for change in changes)
    if plan.traced_flops and abs(plan.flops / plan.traced_flops - 1) > 0.005:
        yield f"Beware: the trace has {plan.traced_flops / 1e12:.3f} TFLOP, the compiled program {plan.flops / 1e12:.3f}."
    if plan.endless_loops:
        yield f"Beware: counted once, for want of a constant number of rounds: {', '.join(plan.endless_loops)}."
    if plan.topology.chip.kind == "gpu":
        yield "Not compiled: what must be held, moved and sent at least. Temporaries come on top."
    elif plan.fits:
        yield "Bounds by the datasheet, not times: what happens inside a kernel or a fusion is not in them."


def _room(plan: Plan) -> Iterator[str]:
    """Yield what makes a program smaller, the cheapest in time first."""
    config, chips = plan.config, plan.topology.chips * plan.topology.chip.devices
    if config.train.remat not in ("names", "full"):
        yield "--config.train.remat=names: the backward pass computes all but attention again."
    elif config.train.remat == "names" and config.model.image.kind == "vit":
        yield "--config.train.remat=full: attention outputs are computed again too."
    if config.mesh.fsdp == 1 and chips > 1:
        yield f"--config.mesh.fsdp={chips // plan.topology.slices}: parameters and moments are cut over all chips."
    rows, parts = config.train.batch_size // (chips // config.mesh.tensor), config.train.micro_batches
    if rows % (2 * parts) == 0:
        yield f"--config.train.micro_batches={2 * parts}: half the activations, one more forward pass of the towers."
    else:
        yield "a larger slice: a chip has few rows already."


def _speed(plan: Plan) -> Iterator[str]:
    """Yield what makes the slowest resource's work less."""
    config, room = plan.config, plan.topology.chip.hbm_bytes - plan.peak_bytes
    text = config.model.text
    if config.train.text_capacity >= 1 and text.causal and text.pool == "end":
        yield "--config.train.text_capacity=0.35: positions behind the end token cost nothing."
    if plan.bound_by == "flops" and config.train.remat in ("names", "full"):
        again = plan.flops / plan.model_flops - 1
        if room > plan.temporary_bytes and again > 0.05:
            yield f"--config.train.remat=dots: {again:.0%} of the flops compute again what there is room to keep."
    if plan.bound_by == "hbm" and config.train.remat != "names" and config.model.image.kind == "vit":
        yield "--config.train.remat=names: activations are computed again instead of being read back."
    if plan.bound_by == "hbm" and config.mesh.fsdp == 1 and plan.optimizer_bytes > 0.1 * plan.hbm_bytes_padded / 7:
        yield "--config.optim.shard_moments=True: every chip updates its part of the parameters only."
    if plan.bound_by == "links" and config.mesh.fsdp > 1:
        yield f"--config.mesh.fsdp={config.mesh.fsdp // 2}: fewer chips gather every layer."
    if plan.bound_by == "network":
        yield "a larger batch: gradients cross between slices once a step, whatever its size."
    if plan.bound_by == "flops" and room < plan.temporary_bytes:
        return
    if plan.global_batch and room > plan.peak_bytes:
        yield f"a smaller slice, or twice the batch: {room / plan.topology.chip.hbm_bytes:.0%} of the memory is free."


def _giga(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + list(row[len(widths) :])
        yield "  " + "  ".join(cells).rstrip()
