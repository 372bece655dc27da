"""The verbs of the command line: each takes the words behind its name and calls the part of llama_jax that does it.

Flags are the parameters of a function or the fields of a stage's config; the heavy parts are imported when a verb runs.
`llama_jax.cli.VERBS` lists them, each with the module here that holds it.
"""
