"""From a model and a prompt to text: the cache of keys and values, the sampler, and the engine around both."""
