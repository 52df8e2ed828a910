// What the optimizer ops share, which step lists of parameters: checks of the lists, and the
// parameters of a call.
#pragma once

#include "device.h"
#include "quaver/codec.h"
#include "quaver/subset.h"

namespace quaver::binding {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// The data of `count` contiguous values of one type.
inline void* data_of(const char* op, const char* name, const Tensor& t, int64_t count,
                     ScalarType type) {
  QUAVER_CHECK(t.numel() == count && t.scalar_type() == type && t.is_contiguous(), op, ": ", name,
               " must be ", count, " contiguous ", torch::headeronly::toString(type), ", got ",
               t.numel(), " of ", torch::headeronly::toString(t.scalar_type()));
  check_aligned(op, name, t);
  return t.data_ptr();
}

template <class List>
void check_length(const char* op, const char* name, const List& list, size_t wanted,
                  bool optional = false) {
  QUAVER_CHECK(list.size() == wanted || (optional && list.empty()), op, ": wanted ", wanted, " ",
               name, ", got ", list.size());
}

// The further bits of a bf16 weight of `count` values: int16, or int8 of a 24-bit master.
inline Remainder remainder_of(const char* op, const Tensors& remainders, size_t i, int64_t count) {
  if (remainders.empty() || remainders[i].numel() == 0) return {};
  const Tensor& t = remainders[i];
  const bool wide = t.scalar_type() == ScalarType::Short;
  QUAVER_CHECK(
      t.numel() == count && (wide || t.scalar_type() == ScalarType::Char) && t.is_contiguous(), op,
      ": a remainder must be ", count, " contiguous int16, or int8 of a 24-bit master, got ",
      t.numel(), " of ", torch::headeronly::toString(t.scalar_type()));
  check_aligned(op, "remainder", t);
  return {t.data_ptr(), wide ? 2 : 1};
}

// Subsets as an op's argument has them: k, or -k for strided ones.
inline Subsets subsets_of(const char* op, int64_t width) {
  QUAVER_CHECK(width > INT64_MIN, op, ": subsets must be above -2^63, got ", width);
  return {width < 0 ? -width : width, width < 0};
}

// A list of an op's tensors, which has `size` of them, or is empty if it is optional.
struct NamedList {
  const char* name;
  const Tensors& list;
  size_t size;
  bool optional = false;
};

// Lengths, and one device for all. The first list is not empty, unless every list may be.
template <size_t kCount>
void check_lists(const char* op, const NamedList (&lists)[kCount]) {
  const Tensors& first = lists[0].list;
  for (const NamedList& named : lists) {
    check_length(op, named.name, named.list, named.size, named.optional);
    if (!first.empty()) check_device(op, first[0], named.name, named.list);
  }
}

// The arguments that every step of `count` parameters has, on the device of `like`. A row of
// `hyper` has `width` numbers, which `meaning` lists.
inline void check_step(const char* op, const Tensor& like, size_t parameters,
                       const Tensor& grad_amax, const Tensor& hyper, const Tensor& skipped,
                       int64_t width, const char* meaning) {
  check_device(op, like, "grad_amax", grad_amax);
  check_device(op, like, "hyper", hyper);
  check_device(op, like, "skipped", skipped);
  const auto count = static_cast<int64_t>(parameters);
  QUAVER_CHECK(grad_amax.numel() == count && grad_amax.scalar_type() == ScalarType::Float, op,
               ": grad_amax must be ", count, " float32, got ", grad_amax.numel(), " of ",
               torch::headeronly::toString(grad_amax.scalar_type()));
  QUAVER_CHECK(hyper.dim() == 2 && hyper.size(0) == count && hyper.size(1) == width &&
                   hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(),
               op, ": hyper must be contiguous [", count, ", ", width, "] float64 (", meaning, ")");
  check_aligned(op, "hyper", hyper);
}

// Fills in what every kind of parameter has of its gradient, seed and row of `hyper`. `grad` and
// `grad_amax` are contiguous.
template <class Parameter>
void read_step(const char* op, size_t i, const Tensor& grad, const Tensor& grad_scale,
               const float* grad_amax, const Ints& seeds, const Tensor& hyper, Parameter* p) {
  p->stochastic = !seeds.empty() && seeds[i] >= 0;
  p->seed = p->stochastic ? static_cast<uint64_t>(seeds[i]) : 0;
  p->grad = view(op, "grad", grad);
  p->grad_scale = optional_scalar(op, "grad_scale", grad_scale);
  p->grad_amax = grad_amax + i;
  p->hyper = static_cast<const double*>(hyper.data_ptr()) + hyper.size(1) * i;
}

// The parameters of a call, and the contiguous tensors that they point to.
template <class Parameter>
struct ParameterList {
  Tensor amax;
  Tensors grads;
  std::vector<Parameter> parameters;

  const Parameter* data() const { return parameters.data(); }
  int64_t count() const { return static_cast<int64_t>(parameters.size()); }
};

// `parameter(i, grad, grad_amax)` makes parameter i.
template <class Parameter, class Make>
ParameterList<Parameter> make_parameters(const Tensors& grads, const Tensor& grad_amax,
                                         Make parameter) {
  ParameterList<Parameter> list;
  list.amax = dense(grad_amax);
  for (size_t i = 0; i < grads.size(); ++i) {
    list.grads.push_back(dense(grads[i]));
    list.parameters.push_back(
        parameter(i, list.grads.back(), static_cast<const float*>(list.amax.data_ptr())));
  }
  return list;
}

}  // namespace quaver::binding
