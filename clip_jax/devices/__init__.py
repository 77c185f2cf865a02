"""Devices: mesh and sharding rules, processes (`jax.distributed`), chip datasheets, CPU allocator."""
