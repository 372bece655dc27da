# An image for GKE: docker build -f tpu_setup/tpu.Dockerfile -t REGION-docker.pkg.dev/PROJECT/images/llama_jax .
FROM python:3.11-slim
WORKDIR /llama_jax
COPY . .
# Versions that were tested together; gcsfs for gs:// paths.
RUN pip install --no-cache-dir -c requirements.lock -e '.[tpu]'
ENV JAX_PLATFORMS=tpu,cpu
CMD ["llama-jax", "doctor"]
