// How an FP8 tensor core adds 32 products to a running sum.
#pragma once

namespace quaver::ptx {

constexpr int kProductDepth = 32, kProductColumns = 256;

// The values of the 256 codes of e4m3, or of e5m2.
const float* fp8_values(bool e5m2);

// sums[j] += a[k] * b[k][j] over k, for the first `columns` of j, rounded once.
void add_exact(float* sums, const float* a, const float (&b)[kProductDepth][kProductColumns],
               int columns);

// The same as Hopper does it (DeepSeek-V3, arXiv 2412.19437, section 3.5.2): every addend, the
// running sum too, is cut to 13 bits below the leading bit of the largest one.
void add_cut(float* sums, const float* a, const float (&b)[kProductDepth][kProductColumns],
             int columns);

}  // namespace quaver::ptx
