"""Documents to batches of packed rows (paper section 2.1, Pretraining Data)."""
