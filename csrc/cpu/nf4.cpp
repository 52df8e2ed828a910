#include "quaver/nf4.h"

#include <algorithm>

#include "../check_nf4.h"
#include "parallel.h"
#include "simd_nf4.h"

namespace quaver::cpu {
namespace {

static_assert(kGrain % kNf4MaxBlock == 0, "a piece of work begins with a block");

// The part of `v` that begins at element i, a multiple of kGrain.
Nf4View piece(const Nf4View& v, int64_t i) {
  return {v.codes + i / 2, v.absmax + i / v.block, std::min(kGrain, v.numel - i), v.block};
}

template <class Body>
void for_pieces(int64_t numel, const Body& body) {
  auto pieces = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(k * kGrain);
  };
  parallel_for((numel + kGrain - 1) / kGrain, 1, pieces);
}

}  // namespace

void nf4_encode(const Nf4View& out, const TensorView& x) {
  check_nf4("nf4_encode", "x", out, x);
  for_pieces(out.numel, [&](int64_t i) {
    const void* from = static_cast<const char*>(x.data) + i * size_of(x.dtype);
    nf4_simd().encode(piece(out, i), from, x.dtype);
  });
}

void nf4_decode(const TensorView& out, const Nf4View& x) {
  check_nf4("nf4_decode", "out", x, out);
  for_pieces(x.numel, [&](int64_t i) {
    void* to = static_cast<char*>(out.data) + i * size_of(out.dtype);
    nf4_simd().decode(to, out.dtype, piece(x, i));
  });
}

}  // namespace quaver::cpu
