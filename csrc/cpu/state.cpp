// Grouped optimizer states to and from values, and the tables that decode expanded ones.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>

#include "../arguments.h"
#include "parallel.h"
#include "quaver/codec.h"
#include "quaver/optimizer.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

constexpr int64_t kStateGrain = kGrain / kGroup * kGroup;

// One table for each power, made when it is first met.
template <class T>
class ExpandedValues {
 public:
  const float* of(uint32_t power) {
    // Asked for every group: without call_once's call where the table is there.
    const float* values = ready_[power].load(std::memory_order_acquire);
    if (values != nullptr) return values;
    std::call_once(made_[power], [&] { make(power); });
    return values_[power].get();
  }

 private:
  void make(uint32_t power) {
    values_[power].reset(new float[256]);
    for (uint32_t code = 0; code < 128; ++code) {
      const float x = contract(code, Format<T>::max_code, log2_of_code<T>(code),
                               1.0f / power_of(bit_cast<float>(0x3f800000u | power)));
      values_[power][code] = x;
      values_[power][code + 128] = -x;
    }
    ready_[power].store(values_[power].get(), std::memory_order_release);
  }

  std::once_flag made_[kPowerMask + 1];
  std::unique_ptr<float[]> values_[kPowerMask + 1];
  std::atomic<const float*> ready_[kPowerMask + 1] = {};
};

StateSpan span_of(const StateView& s) {
  return {s.values.data, s.values.dtype, s.scaling, 1.0f, 1.0f, s.scale};
}

}  // namespace

const float* expanded_values(DType type, uint32_t power) {
  static ExpandedValues<e4m3> of_e4m3;
  static ExpandedValues<e5m2> of_e5m2;
  return type == DType::e4m3 ? of_e4m3.of(power) : of_e5m2.of(power);
}

void encode_state(const StateView& state, const TensorView& x) {
  check_encode_state(state, x);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kStateGrain; i < std::min(end * kStateGrain, x.numel());
         i += kStateGrain) {
      StateSpan s = span_of(state);
      s.values = static_cast<uint8_t*>(s.values) + i;
      s.scales += i / kGroup;
      simd().encode_groups(s, static_cast<const char*>(x.data) + i * size_of(x.dtype), x.dtype,
                           std::min(kStateGrain, x.numel() - i));
    }
  };
  parallel_for((x.numel() + kStateGrain - 1) / kStateGrain, 1, body);
}

void decode_state(const TensorView& out, const StateView& state) {
  check_decode_state(out, state);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kStateGrain; i < std::min(end * kStateGrain, out.numel());
         i += kStateGrain) {
      StateSpan s = span_of(state);
      s.values = static_cast<uint8_t*>(s.values) + i;
      s.scales += i / kGroup;
      simd().decode_groups(out.as<float>() + i, s, std::min(kStateGrain, out.numel() - i));
    }
  };
  parallel_for((out.numel() + kStateGrain - 1) / kStateGrain, 1, body);
}

}  // namespace quaver::cpu
