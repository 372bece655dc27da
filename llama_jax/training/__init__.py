"""What turns batches into a better model: loss, optimizer, step, loop, checkpoints and metrics, the same for every
stage.
"""
