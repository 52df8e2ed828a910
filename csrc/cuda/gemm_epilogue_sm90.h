// The epilogue of the Hopper matrix products: scales, bias, addend, amax and the rounding to the
// format of the result, all of which are arguments (gemm_sm90.h says why).
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "gemm_finish.h"
#include "quaver/gemm.h"

namespace quaver::cuda {
namespace gemm_sm90 {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Int;
using cutlass::Array;

// Elements as they lie in memory. Formats of one size share a kernel, so they are bits to CUTLASS.
template <GemmOut kOut> struct Stored;
template <> struct Stored<GemmOut::half> {
  using type = uint16_t;
};
template <> struct Stored<GemmOut::f32> {
  using type = float;
};
template <> struct Stored<GemmOut::fp8> {
  using type = uint8_t;
};

// The parts of an epilogue node that ours do not need.
template <class P>
struct Node {
  struct SharedStorage {};
  using Arguments = P;
  using Params = P;
  Params params;

  CUTLASS_HOST_DEVICE Node() {}
  CUTLASS_HOST_DEVICE Node(const Params& p, const SharedStorage&) : params(p) {}
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& a, void*) {
    return a;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const fusion::detail::ProducerLoadArgs<Args...>&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }
};

struct SourceArguments {
  bool needed = false;
};

// The addend, as bits. The kernel loads it only if the call accumulates.
struct Source : Node<SourceArguments> {
  using Node<SourceArguments>::Node;
  CUTLASS_DEVICE bool is_producer_load_needed() const { return params.needed; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params.needed; }

  template <class Tensor>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    const Tensor& registers;
    CUTLASS_DEVICE Callbacks(const Tensor& r) : registers(r) {}
    template <class Accumulator, int kSize>
    CUTLASS_DEVICE auto visit(const Array<Accumulator, kSize>&, int v, int, int) {
      return cute::recast<Array<typename Tensor::value_type, kSize>>(registers)(v);
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<cute::remove_cvref_t<decltype(args.tCrC)>>(args.tCrC);
  }
};

struct FinishArguments {
  bool second = false;  // the format of this size that is not bf16 or e4m3: f16 or e5m2
  bool accumulate = false;
  const float* out_scale = nullptr;
  uint32_t* amax = nullptr;
};

template <class To, int kSize>
CUTLASS_DEVICE auto bits_of(const Array<float, kSize>& y) {
  using Bits = cute::uint_bit_t<cutlass::sizeof_bits<To>::value>;
  const Array<To, kSize> rounded = cutlass::NumericArrayConverter<To, float, kSize>{}(y);
  return reinterpret_cast<const Array<Bits, kSize>&>(rounded);
}

template <class From, class Bits, int kSize>
CUTLASS_DEVICE void add(Array<float, kSize>& y, const Array<Bits, kSize>& source) {
  static_assert(sizeof(From) == sizeof(Bits), "the source comes as bits");
  const auto& values = reinterpret_cast<const Array<From, kSize>&>(source);
  const Array<float, kSize> wide = cutlass::NumericArrayConverter<float, From, kSize>{}(values);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kSize; ++i) y[i] += wide[i];
}

// The root node computes the stored value of (sum, scale_a, scale_b, bias, source), with one
// rounding.
template <GemmOut kOut>
struct Finish : Node<FinishArguments> {
  using Node<FinishArguments>::Node;
  using Bits = typename Stored<kOut>::type;

  template <class Coordinates, class Residue>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    FinishArguments params;
    Coordinates coordinates;
    Residue residue;
    float scale = 1.0f;
    uint32_t seen = 0;  // bits of the largest magnitude; every NaN is above infinity

    CUTLASS_DEVICE Callbacks(const FinishArguments& p, const Coordinates& c, const Residue& r)
        : params(p), coordinates(c), residue(r) {
      if constexpr (kOut == GemmOut::fp8) scale = *p.out_scale;
    }

    template <class Accumulator, int kSize, class... Sources>
    CUTLASS_DEVICE Array<Bits, kSize> visit(const Array<Accumulator, kSize>&, int v, int m, int n,
                                            const Array<float, kSize>& sum,
                                            const Array<float, kSize>& scale_a,
                                            const Array<float, kSize>& scale_b,
                                            const Array<float, kSize>& bias,
                                            const Sources&... sources) {
      Array<float, kSize> y;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) y[i] = finish_sum(sum[i], scale_a[i], scale_b[i], bias[i]);
      if constexpr (kOut == GemmOut::fp8) {
        see(y, v, m, n);
        const Divisor by = divisor(scale);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) y[i] = divide_one(y[i], by);
        return params.second ? bits_of<cutlass::float_e5m2_t>(y)
                             : bits_of<cutlass::float_e4m3_t>(y);
      } else if constexpr (kOut == GemmOut::f32) {
        if (params.accumulate) (add<float>(y, sources), ...);
        return y;
      } else {
        if (params.second) {
          if (params.accumulate) (add<cutlass::half_t>(y, sources), ...);
          return bits_of<cutlass::half_t>(y);
        }
        if (params.accumulate) (add<cutlass::bfloat16_t>(y, sources), ...);
        return bits_of<cutlass::bfloat16_t>(y);
      }
    }

    // The amax counts elements inside of the matrix only: outside, y is the bias, not zero.
    template <int kSize>
    CUTLASS_DEVICE void see(const Array<float, kSize>& y, int v, int m, int n) {
      auto here = coordinates(cute::_, cute::_, cute::_, m, n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        if (cute::elem_less(here(v * kSize + i), residue))
          seen = max_bits(seen, magnitude_bits(y[i]));
      }
    }

    // One atomic a warp and tile.
    CUTLASS_DEVICE void end() {
      if constexpr (kOut == GemmOut::fp8) {
        const uint32_t all = __reduce_max_sync(0xffffffffu, seen);
        if (threadIdx.x % 32 == 0 && all != 0) atomicMax(params.amax, all);
      }
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<cute::remove_cvref_t<decltype(args.tCcD)>,
                     cute::remove_cvref_t<decltype(args.residue_tCcD)>>(params, args.tCcD,
                                                                        args.residue_tCcD);
  }
};

}  // namespace gemm_sm90
}  // namespace quaver::cuda
