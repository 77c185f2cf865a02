"""What training costs on a slice that nobody has booked: `python -m clip_jax.plan`."""
