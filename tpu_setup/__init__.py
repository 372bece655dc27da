"""Slices of TPUs and clusters of GPUs, from nothing to a supervised run: `python3 -m tpu_setup --help`."""
