// Schemas of torch.ops.quaver. Fake kernels are registered in python/quaver/ops, autograd functions
// are in python/quaver/nn.
//
// Scales are decode multipliers in f32: x ~= scale * q. An empty tensor in a list stands for none;
// an empty list, where one is allowed, means that no parameter has one. `scalings` are values of
// Scaling (codec.h); a seed >= 0 rounds a 16-bit weight stochastically. Each stage's binding
// registers its kernels for the CPU (and CUDA) key. With `spread_nan` the scale of a value that is
// not finite is NaN.
#include "quaver/cpu.h"
#include "stable.h"

namespace {

constexpr const char* kLayerSchemas[] = {
    "quantize(Tensor x, ScalarType dtype, Tensor? scale=None, Tensor(a!)? history=None, "
    "str granularity='tensor', int block=128, bool power_of_two=True, bool stochastic=False, "
    "int seed=0) -> (Tensor q, Tensor scale, Tensor amax)",
    "dequantize(Tensor q, Tensor scale, ScalarType dtype, str granularity='tensor', "
    "int block=128) -> Tensor",
    "cast_transpose(Tensor x, ScalarType dtype, Tensor? scale=None, Tensor(a!)? history=None, "
    "bool power_of_two=True) -> (Tensor q, Tensor qt, Tensor scale, Tensor amax)",
    "cast_layouts(Tensor x, ScalarType dtype, str granularity, bool rows=True, bool columns=True, "
    "bool power_of_two=False, bool tiles_t=False) "
    "-> (Tensor q, Tensor scale, Tensor qt, Tensor qt_scale)",
    "normalize(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, "
    "ScalarType dtype, Tensor? scale=None, Tensor(a!)? history=None, bool power_of_two=True, "
    "int block=32, bool spread_nan=False) "
    "-> (Tensor q, Tensor qt, Tensor scale, Tensor amax, Tensor xq, Tensor xscale, "
    "Tensor mean, Tensor rstd)",
    "normalize_layouts(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, "
    "ScalarType dtype, bool tiles_t=False, bool power_of_two=True, int block=128) "
    "-> (Tensor q, Tensor scale, Tensor qt, Tensor qt_scale, Tensor xq, Tensor xscale, "
    "Tensor mean, Tensor rstd)",
    "normalize_backward(Tensor dy, Tensor xq, Tensor xscale, Tensor mean, Tensor rstd, "
    "Tensor? weight, int block, bool has_bias, ScalarType dx_dtype) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    "activate(Tensor x, Tensor? up, str kind, Tensor? channel_scale, ScalarType dtype, "
    "Tensor? scale=None, Tensor(a!)? history=None, bool power_of_two=True, int block=32, "
    "bool spread_nan=False) "
    "-> (Tensor q, Tensor qt, Tensor scale, Tensor amax, Tensor xq, Tensor xscale, Tensor uq, "
    "Tensor uscale, Tensor channel_amax)",
    "activate_layouts(Tensor x, Tensor? up, str kind, Tensor? channel_scale, ScalarType dtype, "
    "bool tiles_t=False, bool power_of_two=True, int block=128) "
    "-> (Tensor q, Tensor scale, Tensor qt, Tensor qt_scale, Tensor xq, Tensor xscale, Tensor uq, "
    "Tensor uscale, Tensor channel_amax)",
    "activate_backward_layouts(Tensor dy, Tensor xq, Tensor xscale, Tensor? uq, Tensor? uscale, "
    "str kind, Tensor? channel_scale, int block, ScalarType dtype, bool power_of_two=True) "
    "-> (Tensor dxq, Tensor dxscale, Tensor dxqt, Tensor dxqt_scale, Tensor duq, Tensor duscale, "
    "Tensor duqt, Tensor duqt_scale)",
    "activate_backward(Tensor dy, Tensor xq, Tensor xscale, Tensor? uq, Tensor? uscale, "
    "str kind, Tensor? channel_scale, int block, ScalarType dtype, "
    "Tensor(a!)? x_history=None, Tensor(b!)? up_history=None, bool power_of_two=True, "
    "bool spread_nan=False, bool joint=False) "
    "-> (Tensor dxq, Tensor dxqt, Tensor dxscale, Tensor dxamax, Tensor duq, Tensor duqt, "
    "Tensor duscale, Tensor duamax)",
    "rotate(Tensor[] parts, Tensor cos, Tensor sin, int turned, bool inverse=False) -> Tensor",
    "gemm(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor? bias, "
    "ScalarType out_dtype, bool fast_accumulate=True) -> Tensor",
    "gemm_(Tensor(a!) out, Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, "
    "Tensor? bias=None, bool accumulate=False, bool fast_accumulate=True) -> ()",
    "gemm_quantize(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor? bias, "
    "ScalarType out_dtype, Tensor out_scale, bool fast_accumulate=True) -> (Tensor q, Tensor "
    "amax)",
    "linear(Tensor x, Tensor? codes, Tensor? scale, Tensor weight, Tensor? weight_scale, "
    "Tensor? bias, int n, ScalarType input_dtype, ScalarType weight_dtype, ScalarType out_dtype, "
    "bool both, bool input_major=False, Tensor(a!)? history=None) "
    "-> (Tensor y, Tensor q, Tensor qt, Tensor used_scale, Tensor used_weight_scale)",
    "linear_backward(Tensor dy, Tensor? codes, Tensor? codes_t, Tensor? scale, Tensor? weight, "
    "Tensor? weight_scale, Tensor? xt, Tensor? x_scale, Tensor? channels, int n, int k, "
    "ScalarType grad_dtype, ScalarType weight_dtype, ScalarType dx_dtype, ScalarType dw_dtype, "
    "ScalarType? dw_codes=None, bool input_major=False, Tensor(a!)? history=None) "
    "-> (Tensor dx, Tensor dw, Tensor dw_scale, Tensor dw_amax)",
};

// Rows sorted by group (quaver/groups.h).
constexpr const char* kGroupSchemas[] = {
    "cast_groups(Tensor x, Tensor ends, ScalarType dtype, str granularity, bool columns=True, "
    "bool power_of_two=False, bool tiles_t=False) "
    "-> (Tensor q, Tensor scale, Tensor qt, Tensor qt_scale)",
    "cast_stack(Tensor x, ScalarType dtype, str granularity, Tensor? scale=None, bool rows=True, "
    "bool columns=True, bool power_of_two=False) "
    "-> (Tensor q, Tensor scale, Tensor qt, Tensor qt_scale)",
    "grouped_gemm(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor ends, int n, "
    "ScalarType out_dtype, bool fast_accumulate=True) -> Tensor",
    "grouped_gemm_weight(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor ends, int m, "
    "int n, ScalarType out_dtype, bool fast_accumulate=True) -> Tensor",
};

constexpr const char* kStepSchemas[] = {
    "grad_norm(Tensor[] grads, Tensor[] scales, Tensor[] amaxes) -> (Tensor norm, Tensor amax)",
    "accumulate_(Tensor(a!) q, Tensor(b!) scale, Tensor(c!) amax, Tensor other, "
    "Tensor? other_scale=None, Tensor? other_amax=None) -> ()",
    "share_scales(Tensor amaxes, Tensor? mu, ScalarType dtype) "
    "-> (Tensor scales, Tensor sum_scales)",
    "pack(Tensor[] tensors, Tensor[] tensor_scales, Tensor? scales, ScalarType dtype, "
    "int length) -> Tensor",
    "reduce_shards(Tensor shards, Tensor? scales, Tensor? sum_scales, int[] sizes, int first, "
    "ScalarType dtype) -> (Tensor out, Tensor amax, Tensor saturated)",
    "adam_(Tensor(a!)[] values, Tensor(b!)[] scales, Tensor(c!)[] amaxes, Tensor[] grads, "
    "Tensor[] grad_scales, Tensor grad_amax, Tensor(d!)[] steps, Tensor hyper, "
    "Tensor(e!) skipped, Tensor(f!)[] copies, Tensor(g!)[] remainders, Tensor[] subset_sums, "
    "int[] scalings=[], int[] seeds=[], int[] first_elements=[], int[] subsets=[]) -> ()",
    "subset_sums(Tensor[] grads, Tensor[] scales, Tensor[] amaxes, int[] subsets) "
    "-> (Tensor amax, Tensor sums)",
    "adam_4bit_(Tensor(a!)[] weights, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_sq_scales, Tensor[] grads, "
    "Tensor[] grad_scales, Tensor grad_amax, Tensor(f!)[] steps, Tensor hyper, "
    "Tensor(g!) skipped, Tensor(h!)[] remainders, int[] seconds, int[] seeds=[]) -> ()",
    "micro_adam_(Tensor(a!)[] weights, Tensor(b!)[] indices, Tensor(c!)[] values, "
    "Tensor(d!)[] errors, Tensor(e!)[] ranges, Tensor[] grads, Tensor[] grad_scales, "
    "Tensor grad_amax, Tensor(f!)[] steps, Tensor hyper, Tensor(g!) skipped, "
    "Tensor(h!)[] remainders, int[] kept, int[] error_blocks, int[] seeds=[]) -> ()",
    "encode_state(Tensor x, ScalarType dtype, bool expand) -> (Tensor q, Tensor scale)",
    "decode_state(Tensor q, Tensor scale, bool expand) -> Tensor",
    "nf4_encode(Tensor x, int block=64) -> (Tensor codes, Tensor absmax)",
    "nf4_decode(Tensor codes, Tensor absmax, int numel, ScalarType dtype, int block=64) -> Tensor",
};

constexpr const char* kCommSchemas[] = {
    "comm_id_(Tensor(a!) id, str library) -> ()",
    "comm_create(Tensor id, int rank, int size, float timeout, str library, bool host) -> int",
    "comm_all_to_all_(int comm, Tensor send, int[] send_bytes, Tensor(a!) recv, int[] "
    "recv_bytes) -> ()",
    "comm_all_gather_(int comm, Tensor send, Tensor(a!) recv) -> ()",
    "comm_broadcast_(int comm, Tensor(a!) values, int root) -> ()",
    "comm_all_reduce_(int comm, Tensor(a!) values, str reduction) -> ()",
    "comm_sums_fp8(int comm) -> bool",
    "comm_check(int comm) -> ()",
    "comm_abort(int comm) -> ()",
    "comm_close(int comm) -> ()",
};

}  // namespace

STABLE_TORCH_LIBRARY(quaver, m) {
  for (const char* schema : kLayerSchemas) m.def(schema);
  for (const char* schema : kGroupSchemas) m.def(schema);
  for (const char* schema : kStepSchemas) m.def(schema);
  for (const char* schema : kCommSchemas) m.def(schema);
}

namespace {

// The core's threads are torch's own: one pool in the process.
void torch_threads(int64_t n, int64_t grain, void* context, quaver::cpu::ParallelBody body) {
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

[[maybe_unused]] const bool installed = (quaver::cpu::set_parallel_for(torch_threads), true);

}  // namespace

namespace quaver {
namespace {

OutOfMemoryHandler out_of_memory = nullptr;

}  // namespace

void set_out_of_memory(OutOfMemoryHandler handler) { out_of_memory = handler; }

void binding::throw_out_of_memory(const char* reason) {
  if (out_of_memory != nullptr) out_of_memory(reason);
}

}  // namespace quaver
