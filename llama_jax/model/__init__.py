"""The transformer, its attention kernels and (elsewhere in this package) what replaces or extends its weights."""
