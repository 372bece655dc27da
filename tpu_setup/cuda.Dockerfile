# An image for NVIDIA GPUs, whose CUDA libraries come with jax: docker build -f tpu_setup/cuda.Dockerfile -t llama_jax .
# docker run --gpus all --shm-size 8g -v $PWD/runs:/llama_jax/runs llama_jax llama-jax doctor
FROM python:3.11-slim
WORKDIR /llama_jax
COPY . .
RUN pip install --no-cache-dir -c requirements.lock -e '.[cuda]'
ENV JAX_PLATFORMS=cuda,cpu
CMD ["llama-jax", "doctor"]
