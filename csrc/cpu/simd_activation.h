// The vector loops of normalize and activate, compiled and chosen like those of simd.h. Spans lie
// in one row.
#pragma once

#include "quaver/activation.h"
#include "spans.h"

namespace quaver::cpu {

// A row of group-quantised codes and its scales (quaver/cast.h).
struct GroupedRow {
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t block;
};

// Destination of a row of codes and scales; null saves nothing.
struct SavedRow {
  uint8_t* codes;
  uint8_t* scale;
  int64_t block;
};

// One row of normalize's backward.
struct NormalizeRow {
  void* dx;
  const void* dy;
  DType dx_type, dy_type;
  GroupedRow x;
  float mean, rstd;
  bool centered;
  const float* weight;     // null: none
  float *dweight, *dbias;  // the sums of the row's piece, added to; null where not wanted
};

struct ActivationSimd {
  // The sum of decode(x), or of (decode(x) - mean)^2, in the order of normalize.h.
  float (*row_sum)(const void* x, DType type, int64_t n, float mean, bool squares);
  // out = (x - mean) * rstd * weight + bias; weight and bias may be null.
  void (*normalize)(float* out, const void* x, DType type, int64_t n, float mean, float rstd,
                    const float* weight, const float* bias);
  void (*normalize_backward)(const NormalizeRow& row, int64_t n);
  // n values in groups, of which only the last may be short.
  void (*save_groups)(const SavedRow& to, const void* x, DType type, int64_t n);
  // out = f(x) * up for n <= kBlock; up may be null. Saves both, so that they are decoded once.
  void (*activate)(float* out, const void* x, const void* up, DType type, int64_t n,
                   Activation kind, const SavedRow& x_saved, const SavedRow& up_saved);
  // amax = max(amax, |v|), then v = v * scale
  void (*scale_channels)(float* v, uint32_t* amax_bits, const float* scale, int64_t n);
  // Columns first.. of the rows x and up; `up` may be without codes, and dup is then not written.
  void (*activate_backward)(float* dx, float* dup, const void* dy, DType dy_type,
                            const GroupedRow& x, const GroupedRow& up, const float* channel_scale,
                            int64_t first, int64_t n, Activation kind);
};

const ActivationSimd& activation_simd();

}  // namespace quaver::cpu
