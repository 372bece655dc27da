"""Weights travel to and from other forms exactly: Hugging Face, Meta, llama2.c, ours."""
