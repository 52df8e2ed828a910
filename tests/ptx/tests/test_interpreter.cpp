// The interpreter of PTX itself: what it computes, and the mistakes of kernels that it must show.
#include <cmath>
#include <cstdio>

#include "decode.h"
#include "driver.h"
#include "formats.h"
#include "quaver/fp8.h"
#include "quaver/philox.h"
#include "simt.h"
#include "test.h"

using namespace quaver;
using ptx::Memory;
using ptx::Module;

namespace {

// A kernel of one pointer, %rd1 = parameter, %r0 = thread, %rd2 = parameter + 4 * thread.
std::string text_of(const std::string& body) {
  return ".version 9.0\n.target sm_90a\n.address_size 64\n"
         ".visible .entry k(.param .u64 k_param_0) {\n"
         ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %rd<8>;\n"
         ".shared .align 16 .b8 tile[256];\n"
         "ld.param.u64 %rd1, [k_param_0]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4;\n"
         "add.s64 %rd2, %rd1, %rd2;\n" +
         body + "\nret;\n}\n";
}

struct Result {
  std::vector<uint32_t> words;
  uint64_t instructions;
};

Result run(const std::string& body, int threads, std::vector<uint32_t> words,
           std::vector<int> order = {}, uint64_t limit = 100000) {
  const Module module("test", text_of(body));
  const ptx::Program program = ptx::decode(module.kernel("k"));
  Memory memory;
  memory.add(words.data(), words.size() * 4);
  uint32_t* data = words.data();
  ptx::Launch launch;
  launch.threads = threads;
  launch.chosen = {0};
  launch.limit = limit;
  launch.warps = order;
  for (int w = 0; order.empty() && w * 32 < threads; ++w) launch.warps.push_back(w);
  launch.parameters = ptx::pack(program.kernel, {{&data, sizeof(data)}});
  ptx::Machine machine(program, memory);
  machine.run(launch);
  return {std::move(words), machine.counts().instructions};
}

Result run(const std::string& body) { return run(body, 64, std::vector<uint32_t>(64)); }

const std::string kExchange =  // thread t stores t and reads what thread 63 - t stored
    "mov.u32 %r1, tile; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0;\n"
    "BARRIER sub.s32 %r4, 63, %r0; shl.b32 %r4, %r4, 2; add.s32 %r4, %r1, %r4;\n"
    "ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd2], %r5;";

std::string exchange(const std::string& barrier) {
  std::string s = kExchange;
  return s.replace(s.find("BARRIER"), 7, barrier);
}

}  // namespace

TEST(lanes_that_diverge_meet_again) {
  const Result r =
      run("setp.lt.u32 %p1, %r0, 10; mov.u32 %r1, 1; @%p1 bra LOW;\n"
          "mov.u32 %r1, 2; bra.uni DONE;\nLOW: mov.u32 %r1, 3;\n"
          "DONE: shfl.sync.bfly.b32 %r2, %r1, 31, 31, -1; mad.lo.s32 %r3, %r1, 10, %r2;\n"
          "st.global.u32 [%rd2], %r3;");
  CHECK_EQ(r.words[0], 32u);
  CHECK_EQ(r.words[10], 22u);
  CHECK_EQ(r.words[31], 23u);
  CHECK_EQ(r.words[40], 22u);
}

TEST(loops_run_as_often_as_each_lane_needs) {
  const Result r =
      run("mov.u32 %r1, 0; mov.u32 %r2, 0;\nAGAIN: add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1;\n"
          "setp.le.u32 %p1, %r1, %r0; @%p1 bra AGAIN; st.global.u32 [%rd2], %r2;");
  for (uint32_t t = 0; t < 64; ++t) CHECK_EQ(r.words[t], t * (t + 1) / 2);
}

TEST(a_barrier_orders_shared_memory_whatever_the_order_of_warps) {
  for (const std::vector<int>& order : {std::vector<int>{0, 1}, std::vector<int>{1, 0}}) {
    const Result r = run(exchange("bar.sync 0;"), 64, std::vector<uint32_t>(64), order);
    for (uint32_t t = 0; t < 64; ++t) CHECK_EQ(r.words[t], 63 - t);
  }
}

TEST(a_missing_barrier_is_a_race) {
  CHECK_THROWS(run(exchange("")), "of shared memory, which");
  // Neither lockstep nor a lane's own order excuses threads of one warp.
  CHECK_THROWS(run("mov.u32 %r1, tile; st.shared.u32 [%r1], %r0;"), "a race: thread 1 writes");
  CHECK_THROWS(run("mov.u32 %r1, tile; ld.shared.u32 %r2, [%r1]; setp.eq.s32 %p1, %r0, 40;\n"
                   "@%p1 st.shared.u32 [%r1], %r0;"),
               "a race: thread 40 writes byte 0 of shared memory, which several threads read");
}

TEST(atomics_race_with_plain_accesses_alone) {
  const std::string add = "mov.u32 %r1, tile; atom.shared.add.u32 %r2, [%r1], 1;\n";
  run(add);
  CHECK_THROWS(run(add + "ld.shared.u32 %r3, [%r1];"), "which an atomic wrote");
}

TEST(accesses_outside_of_memory_are_errors) {
  CHECK_THROWS(run("st.global.u32 [%rd2+4], %r0;"),
               "thread 63 writes 4 bytes of global memory outside of every buffer");
  CHECK_THROWS(run("ld.global.u32 %r1, [%rd2+-4];"), "4 bytes before a buffer of 256");
  CHECK_THROWS(run("mov.u64 %rd3, 0; ld.global.u32 %r1, [%rd3];"), "at 0x0, ");
  CHECK_THROWS(run("mov.u32 %r1, tile; ld.shared.u32 %r2, [%r1+256];"),
               "byte 256 of 256 bytes of shared memory");
  CHECK_THROWS(run("st.param.u32 [k_param_0], %r0;"), "a parameter is written");
  CHECK_THROWS(run("ld.param.u64 %rd3, [k_param_0+8];"), "byte 8 of 8 bytes of parameters");
}

TEST(misaligned_accesses_are_errors) {
  CHECK_THROWS(run("ld.global.v2.u32 {%r1, %r2}, [%rd1+4];"), "which is no multiple");
  CHECK_THROWS(run("mov.u32 %r1, tile; st.shared.u32 [%r1+2], %r0;"), "4 bytes at 2");
}

TEST(a_block_that_hangs_is_reported_with_what_its_warps_wait_for) {
  CHECK_THROWS(run("setp.eq.s32 %p1, %r0, 5; @%p1 bra OUT; bar.sync 0;\nOUT:"),
               "63 of 64 threads of block 0 wait");
  CHECK_THROWS(run("setp.lt.u32 %p1, %r0, 32; @%p1 bra OUT; bar.sync 0;\nOUT:"),
               "warp 1: 32 lanes wait at line 9");
  CHECK_THROWS(run("AGAIN: ld.global.u32 %r1, [%rd1]; setp.eq.s32 %p1, %r1, 0; @%p1 bra AGAIN;"),
               "still runs after the limit of instructions");
  CHECK_THROWS(run("setp.eq.s32 %p1, %r0, 5; @%p1 bra OUT;\n"
                   "shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;\nOUT:"),
               "31 of 64 threads of block 0 wait");
}

TEST(what_is_not_supported_is_an_error_with_its_line) {
  CHECK_THROWS(run("frob.u32 %r1, %r0;"), "ptx: line 9: not supported: frob.u32 %r1, %r0");
  CHECK_THROWS(run("add.rm.f32 %f1, %f1, %f2;"), "the modifier .rm is not supported");
  CHECK_THROWS(run("add.ftz.f32 %f1, %f1, %f2;"), "the modifier .ftz is not supported");
  CHECK_THROWS(run("add.s32 %r1, %rd1, 1;"), "has 8 bytes and not 4");
  CHECK_THROWS(run("mov.u32 %r1, %clock;"), "the special register %clock");
  CHECK_THROWS(run("bra NOWHERE;"), "unknown label");
  CHECK_THROWS(run("div.s32 %r1, %r0, 0;"), "division by zero");
}

TEST(instructions_are_counted_by_thread) {
  const uint64_t before = run("").instructions;
  CHECK_EQ(before, 64u * 5);
  CHECK_EQ(run("add.s32 %r1, %r0, 1;").instructions, before + 64);
  CHECK_EQ(run("setp.lt.u32 %p1, %r0, 3; @%p1 bra OUT;\nadd.s32 %r1, %r0, 1;\nOUT:").instructions,
           before + 64 * 2 + 61);
}

// The library's codecs are the second opinion: neither was copied from the other.
TEST(extremes_take_nan_and_magnitudes_as_their_modifiers_say) {
  const auto one = [](const std::string& op, const std::string& a, const std::string& b) {
    return run("mov.f32 %f1, " + a + "; mov.f32 %f2, " + b + "; " + op +
               " %f3, %f1, %f2; st.global.f32 [%rd2], %f3;")
        .words[0];
  };
  const std::string nan = "0f7FC00000", two = "0f40000000", minus_three = "0fC0400000";
  CHECK_EQ(one("max.f32", nan, two), 0x40000000u);
  CHECK_EQ(one("max.NaN.f32", nan, two), 0x7fffffffu);
  CHECK_EQ(one("min.NaN.f32", two, nan), 0x7fffffffu);
  CHECK_EQ(one("max.NaN.f32", two, minus_three), 0x40000000u);
  CHECK_EQ(one("max.xorsign.abs.f32", two, minus_three), 0xc0400000u);
  CHECK_EQ(one("max.NaN.xorsign.abs.f32", minus_three, minus_three), 0x40400000u);
  CHECK_EQ(one("max.NaN.xorsign.abs.f32", minus_three, nan) & 0x7fffffffu, 0x7fffffffu);
  CHECK_EQ(one("min.xorsign.abs.f32", two, minus_three), 0xc0000000u);
}

TEST(sums_toward_zero_and_pairs_of_halves) {
  const auto sum = [](float a, float b) {
    const auto hex = [](float x) {
      char text[16];
      std::snprintf(text, sizeof(text), "0f%08X", bit_cast<uint32_t>(x));
      return std::string(text);
    };
    return bit_cast<float>(run("mov.f32 %f1, " + hex(a) + "; mov.f32 %f2, " + hex(b) +
                               "; add.rz.f32 %f3, %f1, %f2; st.global.f32 [%rd2], %f3;")
                               .words[0]);
  };
  CHECK_EQ(sum(16384.0f, 0.99f / 512.0f), 16384.0f);
  CHECK_EQ(sum(16384.0f, 1.99f / 512.0f), 16384.0f + 1.0f / 512.0f);
  CHECK_EQ(sum(-16384.0f, -1.99f / 512.0f), -16384.0f - 1.0f / 512.0f);
  CHECK_EQ(sum(1.0f, -1e-30f), std::nextafter(1.0f, 0.0f));
  CHECK_EQ(sum(1.0f, 1e-30f), 1.0f);
  CHECK_EQ(sum(3e38f, 3e38f), 3.40282347e38f);
  const std::string halves =  // 1.5 and -3 times 2^-7, then e4m3
      "mov.u32 %r1, 0xC2003E00; mov.u32 %r2, 0x20002000; mul.rn.f16x2 %r3, %r1, %r2;\n";
  CHECK_EQ(run(halves + "st.global.u32 [%rd2], %r3;").words[0], 0xa6002200u);
  CHECK_EQ(run("mov.u32 %r1, 0xC2003E00; cvt.rn.satfinite.e4m3x2.f16x2 %h1, %r1;\n"
               "cvt.u32.u16 %r2, %h1; st.global.u32 [%rd2], %r2;")
               .words[0],
           0xc43cu);
}

TEST(conversions_agree_with_the_codecs_of_the_library) {
  for (uint32_t code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    const float a = decode(e4m3{byte}), b = decode(e5m2{byte});
    CHECK(a != a || ptx::bits_of(a) == ptx::bits_of(ptx::decode(code, ptx::kE4M3)));
    CHECK(b != b || ptx::bits_of(b) == ptx::bits_of(ptx::decode(code, ptx::kE5M2)));
  }
  for (uint32_t code = 0; code < 65536; ++code) {
    const float x = decode(f16{static_cast<uint16_t>(code)});
    CHECK(x != x || ptx::bits_of(x) == ptx::bits_of(ptx::decode(code, ptx::kF16)));
  }
  for (uint64_t i = 0; i < 2000000; ++i) {
    uint32_t bits = random_bits(1, i);
    if (i % 2) bits = (bits & 0x807fffff) | (100 + bits % 50) << 23;  // near the formats' ranges
    if (i % 3 == 0) bits &= 0xfff00000;                               // ties
    const float x = ptx::float_of(bits);
    if (x != x) continue;
    CHECK_EQ(uint32_t(encode_nearest<f16>(x).bits), ptx::encode(x, ptx::kF16, true, true));
    CHECK_EQ(uint32_t(encode_nearest<e4m3>(x).bits), ptx::encode(x, ptx::kE4M3, true, true));
    CHECK_EQ(uint32_t(encode_nearest<e5m2>(x).bits), ptx::encode(x, ptx::kE5M2, true, true));
  }
}
