"""GPUs that are not there, described to the compiler: XLA compiles for NVIDIA GPUs on any machine that has its CUDA plugin.

What the compiler chooses by measuring on a GPU (the algorithms of matmuls, cuDNN's workspace) it takes by default here.
"""

from dataclasses import dataclass

from llama_jax.planning.hardware import A100_40GB, A100_80GB, GPU_MEMORY_SHARE, H100, H100_PCIE, H200, L4, T4, Chip


@dataclass(frozen=True)
class _Processors:
    """What NVIDIA publishes of a GPU's multiprocessors, which the compiler lays out its kernels by."""

    kind: str
    """The GPU's name, as its driver has it."""
    count: int
    clock_ghz: float
    fpus: int
    """Of a multiprocessor, for float32."""
    threads: int
    """That a multiprocessor holds at most."""
    shared_bytes: int
    """Shared memory of a multiprocessor; a block may have 1 kB less."""
    l2_bytes: int


_HOPPER = {"fpus": 128, "threads": 2048, "shared_bytes": 228 * 2**10, "l2_bytes": 50 * 2**20}
_AMPERE = {"fpus": 64, "threads": 2048, "shared_bytes": 164 * 2**10, "l2_bytes": 40 * 2**20}
_PROCESSORS = {
    T4: _Processors("Tesla T4", 40, 1.59, fpus=64, threads=1024, shared_bytes=64 * 2**10, l2_bytes=4 * 2**20),
    L4: _Processors("NVIDIA L4", 58, 2.04, fpus=128, threads=1536, shared_bytes=100 * 2**10, l2_bytes=48 * 2**20),
    A100_40GB: _Processors("NVIDIA A100-SXM4-40GB", 108, 1.41, **_AMPERE),
    A100_80GB: _Processors("NVIDIA A100-SXM4-80GB", 108, 1.41, **_AMPERE),
    H100: _Processors("NVIDIA H100 80GB HBM3", 132, 1.98, **_HOPPER),
    H100_PCIE: _Processors("NVIDIA H100 PCIe", 114, 1.755, **_HOPPER),
    H200: _Processors("NVIDIA H200", 132, 1.98, **_HOPPER),
}


def target_config(chip: Chip, cuda: tuple[int, int, int], cudnn: tuple[int, int, int]) -> str:
    """A GPU as XLA's compiler wants it described (a GpuTargetConfigProto in text form).

    Args:
      chip: the GPU.
      cuda: version of CUDA that is compiled for.
      cudnn: version of cuDNN.
    """
    own = _PROCESSORS[chip]
    major, minor = divmod(round(10 * chip.compute_capability), 10)
    return f"""
        platform_name: "CUDA"
        device_description_str: "{own.kind}"
        dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
        runtime_version {{ major: {cuda[0]} minor: {cuda[1]} patch: {cuda[2]} }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {own.count}
          clock_rate_ghz: {own.clock_ghz}
          fpus_per_core: {own.fpus}
          threads_per_core_limit: {own.threads}
          shared_memory_per_core: {own.shared_bytes}
          shared_memory_per_block_optin: {own.shared_bytes - 1024 * (chip.compute_capability >= 8)}
          shared_memory_per_block: {48 * 2**10}
          l2_cache_size: {own.l2_bytes}
          device_memory_size: {int(chip.usable_bytes / GPU_MEMORY_SHARE)}
          memory_bandwidth: {int(chip.hbm_bytes_per_s)}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}"""
