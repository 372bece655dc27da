"""What a run needs and what a machine has: chips, and the plans that are computed from them."""
