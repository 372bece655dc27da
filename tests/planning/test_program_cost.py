"""What a program costs, counted from its text: on programs whose cost is known, compiled here, and on lines as TPUs have them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.parallel.mesh import make_mesh, mesh_sizes
from llama_jax.planning.hlo import parse
from llama_jax.planning.program_cost import program_cost, replica_groups

MESH_TEXT = "fsdp=4,tensor=2"


def cost_of(function, *arguments):
    return program_cost(parse(jax.jit(function).lower(*arguments).compile().as_text()), 8)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESH_TEXT)


def test_a_matmul_is_two_flops_a_product_and_its_arrays_once():
    cost = cost_of(lambda a, b: a @ b, floats(64, 32), floats(32, 16))
    assert cost.flops == 2 * 64 * 32 * 16
    assert cost.hbm_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert not cost.collectives


def test_batched_matmuls_and_gradients():
    def scores(q, k):
        return jnp.einsum("bthd,bshd->bhts", q, k)

    q, k = floats(2, 7, 3, 8), floats(2, 9, 3, 8)
    forward = 2 * 2 * 7 * 9 * 3 * 8
    assert cost_of(scores, q, k).flops == forward
    assert cost_of(jax.grad(lambda q, k: (scores(q, k) ** 2).sum(), (0, 1)), q, k).flops == 3 * forward


def test_a_loop_counts_as_often_as_it_runs_within_another_too():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def steps(x, w):
        return jax.lax.scan(lambda x, _: (layers(x, w), None), x, None, length=3)[0]

    assert cost_of(layers, floats(8, 32), floats(5, 32, 32)).flops == 5 * 2 * 8 * 32 * 32
    assert cost_of(steps, floats(8, 32), floats(5, 32, 32)).flops == 3 * 5 * 2 * 8 * 32 * 32


def test_a_loop_reads_the_slice_it_takes_and_not_the_whole():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x + w), None), x, w)[0]

    n, size = 50, 4 * 64 * 64
    cost = cost_of(layers, floats(64, 64), floats(n, 64, 64))
    # Every step reads x and a slice and writes x, through a copy or two; reading all of w would be n * n slices.
    assert 3 * n * size <= cost.hbm_bytes <= 8 * n * size


def collectives_of(mesh, function, in_spec, out_spec, *shape):
    """Kind, bytes, axes and times of the collectives of a function of one array's parts."""
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
    run = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    found = cost_of(run, argument).collectives
    return [(one.kind, one.bytes, one.axes(mesh_sizes(mesh)), one.times) for one in found]


P = PartitionSpec
WHOLE = 4 * 32 * 16


@pytest.mark.parametrize(
    ("function", "in_spec", "out_spec", "expected"),
    [
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), P(), ("all-gather", WHOLE, ("fsdp",))),
        (lambda x: jax.lax.psum(x, ("fsdp", "tensor")), P(), P(), ("all-reduce", WHOLE, ("fsdp", "tensor"))),
        (
            lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
            P(),
            P("tensor"),
            ("reduce-scatter", WHOLE, ("tensor",)),
        ),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            P("fsdp"),
            P("fsdp"),
            ("collective-permute", WHOLE / 4, ("fsdp",)),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True),
            P("fsdp"),
            P("fsdp"),
            ("all-to-all", WHOLE / 4, ("fsdp",)),
        ),
    ],
)
def test_a_collective_is_known_by_kind_bytes_and_axes(mesh, function, in_spec, out_spec, expected):
    assert collectives_of(mesh, function, in_spec, out_spec, 32, 16) == [(*expected, 1)]


def test_a_sharded_matmul_does_its_share_and_sums_the_rest(mesh):
    def sharded(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def multiply(a, b):
        return jax.lax.with_sharding_constraint(a @ b, NamedSharding(mesh, P()))

    cost = cost_of(multiply, sharded((64, 32), None, "fsdp"), sharded((32, 16), "fsdp", None))
    (exchange,) = cost.collectives
    assert cost.flops == 2 * 64 * 32 * 16 / 4
    assert (exchange.kind, exchange.bytes, exchange.axes(mesh_sizes(mesh))) == ("all-reduce", 64 * 16 * 4, ("fsdp",))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("channel_id=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_of_devices_in_every_form_they_are_written_in(written, groups):
    assert replica_groups(written, 8).tolist() == groups


# As libtpu writes them: a matmul over 32 heads as a convolution that slides over padding, beside it a gather that two of them
# hide; a loop around a ring; and one kernel of splash attention.
TPU = Path(__file__).with_name("tpu_program.txt").read_text()


def test_a_tpus_matmuls_kernels_and_collectives():
    cost = program_cost(parse(TPU), 16)
    # The window slides over 32 places, and meets an element of the input in one product for each output.
    assert cost.matmul_flops == 2 * (2 * 2 * 4096 * 4096 * 32 * 128)
    # 8 x 8 blocks, of which a causal mask leaves 36; scores and values.
    assert cost.kernel_flops == 2 * 2 * (2 * 32) * 128 * 36 * 512 * 512
    assert cost.estimated_cycles == 200
    # The gather runs beside two matmuls and is one; the permutation is in a loop that counts to 8 by twos.
    known = [(one.kind, one.bytes, one.groups.shape, one.times) for one in cost.collectives]
    assert known == [("all-gather", 2 * 4096, (1, 16), 1), ("collective-permute", 8, (2, 2), 4)]
    # Each matmul reads its input and writes its output; its weights lie on the chip, and what is gathered is counted once.
    array = 2 * 2 * 4096 * 4096
    kernel, counter = 4 * array, 4 * 12
    gather, permutations = 2 * (4096 + 256), 4 * 2 * 8
    assert cost.hbm_bytes == 2 * 2 * array + kernel + counter + gather + permutations


def test_an_unknown_kernel_is_named_and_not_guessed():
    cost = program_cost(parse(TPU.replace("splash_mha_fwd_segmented.2", "my_kernel.7")), 16)
    assert cost.kernel_flops == 0 and cost.unknown_kernels == ("my_kernel",)


def test_a_loop_that_cannot_be_counted_is_an_error_and_no_guess():
    with pytest.raises(ValueError, match="cond does not compare a counter with a constant"):
        program_cost(parse(TPU.replace("direction=LT", "direction=NE")), 16)


def test_spans_of_queries_count_the_one_that_sees_most():
    spans = TPU.replace("custom-call(%q, %q, %q)", "custom-call(%q, %k, %k)").replace(
        "%x = bf16[4]{0} parameter(5)", "%x = bf16[4]{0} parameter(5)\n  %k = bf16[2,32,8192,128]{3,2,1,0} parameter(6)"
    )
    blocks = np.arange(9, 17).sum()  # queries 8 to 15 of 16 blocks
    assert program_cost(parse(spans), 16).kernel_flops == 2 * 2 * (2 * 32) * 128 * blocks * 512 * 512


TWO_SLICES = """\
HloModule slices

%all-reduce-scatter (input: bf16[1024,1024]) -> bf16[256,1024] {
  %input = bf16[1024,1024]{1,0} parameter(0)
  %sum = bf16[1024,1024]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %place = s32[] constant(0)
  ROOT %mine = bf16[256,1024]{1,0} dynamic-slice(%sum, %place, %place), dynamic_slice_sizes={256,1024}
}

ENTRY %main (gradient: bf16[1024,1024]) -> bf16[256,1024] {
  %gradient = bf16[1024,1024]{1,0} parameter(0)
  %mine = bf16[256,1024]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter
  %begin = token[] after-all()
  %send = (bf16[256,1024]{1,0}, u32[], token[]) send(%mine, %begin), channel_id=2, is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[256,1024]{1,0}, u32[], token[]) recv(%begin), channel_id=1, is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %received = (bf16[256,1024]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %out = bf16[256,1024]{1,0} get-tuple-element(%received), index=0
}
"""


def test_what_goes_between_slices_and_a_sum_of_which_a_part_is_kept():
    """As libtpu writes the gradients of two slices of four: a reduce-scatter in disguise, then each part over the network."""
    mesh = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    found = [(one.kind, one.bytes, one.axes(mesh)) for one in program_cost(parse(TWO_SLICES), 8).collectives]
    assert found == [("reduce-scatter", 2 * 1024 * 1024, ("fsdp",)), ("all-reduce", 2 * 256 * 1024, ("data",))]


def test_an_all_reduce_that_is_kept_whole_is_none_in_disguise():
    whole = TWO_SLICES.replace(
        "ROOT %mine = bf16[256,1024]{1,0} dynamic-slice", "ROOT %mine = bf16[256,1024]{1,0} slice"
    )
    assert program_cost(parse(whole), 8).collectives[0].kind == "all-reduce"


SUMS_AND_A_CHAIN = """\
HloModule context

%sum_of_keys (input: bf16[8192,1024]) -> bf16[2048,1024] {
  %input = bf16[8192,1024]{1,0} parameter(0)
  %keys = bf16[8192,1024]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %place = s32[] constant(0)
  ROOT %mine = bf16[2048,1024]{1,0} dynamic-slice(%keys, %place, %place), dynamic_slice_sizes={2048,1024}
}

%sum_of_values (input.1: bf16[8192,1024]) -> bf16[2048,1024] {
  %input.1 = bf16[8192,1024]{1,0} parameter(0)
  %values = bf16[8192,1024]{1,0} all-reduce(%input.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %place.1 = s32[] constant(0)
  ROOT %mine.1 = bf16[2048,1024]{1,0} dynamic-slice(%values, %place.1, %place.1), dynamic_slice_sizes={2048,1024}
}

%begun (input.2: bf16[256,1024]) -> bf16[1024,1024] {
  %input.2 = bf16[256,1024]{1,0} parameter(0)
  ROOT %gather.1 = bf16[1024,1024]{1,0} all-gather(%input.2), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%ended (input.3: bf16[256,1024]) -> bf16[1024,1024] {
  %input.3 = bf16[256,1024]{1,0} parameter(0)
  ROOT %gather.2 = bf16[1024,1024]{1,0} all-gather(%input.3), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

ENTRY %main (k: bf16[8192,1024], v: bf16[8192,1024], w: bf16[256,1024]) -> (bf16[2048,1024], bf16[2048,1024], bf16[1024,1024]) {
  %k = bf16[8192,1024]{1,0} parameter(0)
  %v = bf16[8192,1024]{1,0} parameter(1)
  %w = bf16[256,1024]{1,0} parameter(2)
  %dk = bf16[2048,1024]{1,0} fusion(%k), kind=kCustom, calls=%sum_of_keys
  %dv = bf16[2048,1024]{1,0} fusion(%v), kind=kCustom, calls=%sum_of_values
  %there = bf16[1024,1024]{1,0} fusion(%w), kind=kCustom, calls=%begun
  %back = bf16[1024,1024]{1,0} fusion(%w), kind=kCustom, calls=%ended
  ROOT %out = (bf16[2048,1024]{1,0}, bf16[2048,1024]{1,0}, bf16[1024,1024]{1,0}) tuple(%dk, %dv, %back)
}
"""


def test_sums_of_one_channel_are_several_and_the_links_of_a_chain_one():
    """As libtpu writes a step over `context`: what a kernel sums over devices, keys' gradients and values', has one channel; a gather
    that runs beside matmuls is written into each of them.
    """
    found = [(one.kind, one.bytes) for one in program_cost(parse(SUMS_AND_A_CHAIN), 4).collectives]
    whole = 2 * 8192 * 1024
    assert found == [("reduce-scatter", whole), ("reduce-scatter", whole), ("all-gather", 2 * 1024 * 1024)]


# As XLA writes them for GPUs, shortened: cuBLAS, and cuDNN's attention of 4 x 256 tokens with 8 heads of 64, and its backward pass.
GPU = """HloModule gpu

ENTRY %main (a: f32[512,64], b: f32[64,48], q: bf16[4,256,8,64]) -> f32[512,48] {
  %a = f32[512,64]{1,0} parameter(0)
  %b = f32[64,48]{1,0} parameter(1)
  %q = bf16[4,256,8,64]{3,2,1,0} parameter(2)
  %f = (bf16[4,8,256,64]{3,1,2,0}, f32[4,8,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"mask_type": "CAUSAL"}}
  %d = (bf16[4,8,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config":{"mask_type": "CAUSAL"}}
  ROOT %c = (f32[512,48]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501


def test_a_gpus_matmuls_and_attention():
    """Attention is two matmuls forward and five backward, of which a causal mask leaves half."""
    scores = 2 * 4 * 8 * 256 * 256 * 64
    cost = program_cost(parse(GPU), 1)
    assert cost.matmul_flops == 2 * 512 * 64 * 48
    assert cost.kernel_flops == (2 + 5) * scores / 2
    assert program_cost(parse(GPU.replace("CAUSAL", "NO_MASK")), 1).kernel_flops == (2 + 5) * scores
    larger = program_cost(parse(GPU.replace("s8[1024]", "s8[4194304]")), 1)
    assert larger.hbm_bytes == cost.hbm_bytes, "workspace is not traffic"


def test_another_kernel_of_cudnn_is_named_and_not_guessed():
    cost = program_cost(parse(GPU.replace('__cudnn$fmhaSoftmax"', '__cudnn$norm"')), 1)
    assert cost.unknown_kernels == ("f",) and cost.kernel_flops > 0
