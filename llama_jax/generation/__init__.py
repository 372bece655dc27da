"""From a model and a prompt to text: the cache of keys and values, sampling, and `Llama`, which batches and streams."""
