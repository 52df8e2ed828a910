#include "quaver/all_reduce.h"

#include <tuple>

#include "device.h"

namespace quaver::binding {
namespace {

using Sizes = std::vector<int64_t>;

std::tuple<Tensor, Tensor> share_scales(const Tensor& amaxes_in, const OptionalTensor& mu_in,
                                        ScalarType dtype) {
  const char* op = "share_scales";
  QUAVER_CHECK(amaxes_in.dim() == 2, op, ": amaxes must be [ranks, tensors], got ", amaxes_in.dim(),
               " axes");
  check_device(op, amaxes_in, "mu", mu_in);
  const Tensor amaxes = dense(amaxes_in);
  const OptionalTensor mu = dense(mu_in);
  const int64_t ranks = amaxes.size(0), count = amaxes.size(1);
  const float* from = floats(op, "amaxes", amaxes, ranks * count);
  const float* mus = floats(op, "mu", mu, count);
  const DType type = dtype_of(op, "dtype", dtype);
  Tensor scales = empty(amaxes, {count}, ScalarType::Float);
  Tensor sum_scales = empty(amaxes, {count}, ScalarType::Float);
  auto* out = static_cast<float*>(scales.data_ptr());
  auto* sum_out = static_cast<float*>(sum_scales.data_ptr());
  on_device(
      op, amaxes, [&] { cpu::share_scales(out, sum_out, from, mus, ranks, count, type); },
      [&](auto stream) {
        cuda::share_scales(out, sum_out, from, mus, ranks, count, type, stream);
      });
  return {scales, sum_scales};
}

Tensor pack(const std::vector<Tensor>& tensors, const std::vector<Tensor>& tensor_scales,
            const OptionalTensor& scales_in, ScalarType dtype, int64_t length) {
  const char* op = "pack";
  const size_t n = tensors.size();
  QUAVER_CHECK(n > 0, op, ": no tensors");
  QUAVER_CHECK(tensor_scales.size() == n, op, ": ", n, " tensors with ", tensor_scales.size(),
               " scales");
  QUAVER_CHECK(length >= 0, op, ": length must not be negative, got ", length);
  check_device(op, tensors[0], "tensors", tensors);
  check_device(op, tensors[0], "tensor_scales", tensor_scales);
  check_device(op, tensors[0], "scales", scales_in);
  const OptionalTensor scales = dense(scales_in);
  std::vector<Tensor> kept(n);
  std::vector<ScaledView> views(n);
  for (size_t i = 0; i < n; ++i) {
    kept[i] = dense(tensors[i]);
    views[i].values = view(op, "tensor", kept[i]);
    views[i].scale = optional_scalar(op, "scale", tensor_scales[i]);
  }
  const auto count = static_cast<int64_t>(n);
  const float* shared = floats(op, "scales", scales, count);
  dtype_of(op, "dtype", dtype);  // before memory is asked for
  Tensor bucket = empty(tensors[0], {length}, dtype);
  const TensorView out = view(op, "bucket", bucket);
  on_device(
      op, tensors[0], [&] { cpu::pack(out, views.data(), count, shared); },
      [&](auto stream) {
        Tensor memory = workspace(tensors[0], cuda::pack_workspace_bytes(count));
        cuda::pack(out, views.data(), count, shared, memory.data_ptr(), stream);
      });
  return bucket;
}

std::tuple<Tensor, Tensor, Tensor> reduce_shards(const Tensor& shards_in,
                                                 const OptionalTensor& scales_in,
                                                 const OptionalTensor& sum_scales_in,
                                                 const Sizes& sizes, int64_t first,
                                                 ScalarType dtype) {
  const char* op = "reduce_shards";
  QUAVER_CHECK(shards_in.dim() == 2, op, ": shards must be [ranks, length], got ", shards_in.dim(),
               " axes");
  check_device(op, shards_in, "scales", scales_in);
  check_device(op, shards_in, "sum_scales", sum_scales_in);
  const Tensor shards = dense(shards_in);
  const OptionalTensor scales = dense(scales_in), sum_scales = dense(sum_scales_in);
  ShardedSum sum;
  sum.shards = view(op, "shards", shards);
  sum.first = first;
  sum.sizes = sizes.data();
  sum.count = static_cast<int64_t>(sizes.size());
  sum.scales = floats(op, "scales", scales, sum.count);
  sum.sum_scales = floats(op, "sum_scales", sum_scales, sum.count);
  dtype_of(op, "dtype", dtype);
  Tensor out = empty(shards, {sum.shards.cols}, dtype);
  Tensor amax = empty(shards, {sum.count}, ScalarType::Float);
  Tensor saturated = empty(shards, {sum.count}, ScalarType::Int);
  const TensorView to = view(op, "out", out);
  auto* amax_out = static_cast<float*>(amax.data_ptr());
  auto* saturated_out = static_cast<int32_t*>(saturated.data_ptr());
  on_device(
      op, shards, [&] { cpu::reduce_shards(to, amax_out, saturated_out, sum); },
      [&](auto stream) {
        Tensor memory = workspace(shards, cuda::reduce_shards_workspace_bytes(sum.count));
        cuda::reduce_shards(to, amax_out, saturated_out, sum, memory.data_ptr(), stream);
      });
  return {out, amax, saturated};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("share_scales", TORCH_BOX(&share_scales));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("reduce_shards", TORCH_BOX(&reduce_shards));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
