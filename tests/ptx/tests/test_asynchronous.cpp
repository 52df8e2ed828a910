// Clusters, mbarriers, copies by tensor map and matrices on the interpreter: what they do, and the
// mistakes of kernels that it must show.
#include "asynchronous.h"
#include "decode.h"
#include "driver.h"
#include "formats.h"
#include "quaver/philox.h"
#include "simt.h"
#include "tensor_core.h"
#include "test.h"

using namespace quaver;
using ptx::Dim;
using ptx::TensorMap;

namespace {

// %rd1 = words, %rd2 = the tensor map, %r0 = thread, %r1 = tile of 1024 bytes, %r2 = an mbarrier.
std::string text_of(const std::string& body) {
  return ".version 9.0\n.target sm_90a\n.address_size 64\n"
         ".extern .shared .align 1024 .b8 tile[];\n"
         ".visible .entry k(.param .u64 words, .param .align 64 .b8 map[128]) {\n"
         ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<24>; .reg .f32 %f<8>; .reg .b64 %rd<8>;\n"
         "ld.param.u64 %rd1, [words]; mov.b64 %rd3, map; cvta.param.u64 %rd2, %rd3;\n"
         "mov.u32 %r0, %tid.x; mov.u32 %r1, tile; add.s32 %r2, %r1, 1024;\n" +
         body + "\nret;\n}\n";
}

const std::string kFirst = "setp.ne.s32 %p1, %r0, 0; @%p1 bra AFTER;\n";
const std::string kInit = "mbarrier.init.shared::cta.b64 [%r2], 1;\n";
const std::string kLoad =
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;\n"
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], "
    "[%rd2, {COLUMN, 0}], [%r2];\n";
const std::string kWait =
    "mov.u32 %r3, 0;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], %r3;\n"
    "@!%p2 bra WAIT;\n";
const std::string kStore =
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {0, 8}], [%r1];\n"
    "cp.async.bulk.commit_group;\n";
const std::string kStored = "cp.async.bulk.wait_group.read 0;\n";

std::string load_at(int column) {
  std::string s = kLoad;
  return s.replace(s.find("COLUMN"), 6, std::to_string(column));
}

using Words = std::vector<uint32_t>;

// A tensor of 16 x 32 words, of which a box has 8 x 32.
TensorMap map_of(const Words& words, int swizzle) {
  const uint64_t sizes[] = {32, 16}, strides[] = {128};
  const uint32_t box[] = {32, 8}, steps[] = {1, 1};
  return ptx::encode({4, 2, reinterpret_cast<uint64_t>(words.data()), sizes, strides, box, steps,
                      false, static_cast<uint32_t>(swizzle)});
}

Words counted() {
  Words words(512);
  for (uint32_t i = 0; i < 512; ++i) words[i] = i + 1;
  return words;
}

ptx::Launch launch_of(int threads, bool late = false) {
  ptx::Launch l;
  l.threads = threads;
  l.timing.late_loads = l.timing.late_stores = l.timing.late_products = late;
  return l;
}

Words run(const std::string& body, ptx::Launch launch = launch_of(32), int swizzle = 0,
          Words words = counted()) {
  const ptx::Module module("test", text_of(body));
  const ptx::Program program = ptx::decode(module.kernel("k"));
  ptx::Memory memory;
  memory.add(words.data(), words.size() * 4);
  uint32_t* data = words.data();
  const TensorMap map = map_of(words, swizzle);
  unsigned char bytes[128] = {};
  std::memcpy(bytes, &map, sizeof(map));
  launch.dynamic_shared = 1024 + 8;
  launch.limit = 100000;
  if (launch.chosen.empty()) launch.chosen = {0};
  for (int w = 0; w * 32 < launch.threads; ++w) launch.warps.push_back(w);
  launch.parameters = ptx::pack(program.kernel, {{&data, sizeof(data)}, {bytes, sizeof(bytes)}});
  ptx::Machine machine(program, memory);
  machine.run(launch);
  return words;
}

ptx::Launch pair() {
  ptx::Launch l = launch_of(32);
  l.grid = {2, 3, 2};
  l.cluster = {2, 1, 1};
  l.chosen = {0, 1, 2, 3, 4, 5};
  l.resident = 2;
  return l;
}

}  // namespace

TEST(copies_land_and_leave_whenever_it_is) {
  for (const bool late : {false, true})
    for (const int swizzle : {0, 3}) {
      const Words w = run(kFirst + kInit + load_at(0) + kWait + kStore + kStored + "AFTER:",
                          launch_of(64, late), swizzle);
      for (uint32_t i = 0; i < 512; ++i) CHECK_EQ(w[i], i % 256 + 1);
    }
}

TEST(what_lies_outside_of_a_tensor_is_zero_and_is_not_written) {
  const Words w = run(kFirst + kInit + load_at(20) + kWait + kStore + kStored + "AFTER:");
  for (uint32_t i = 0; i < 256; ++i) CHECK_EQ(w[256 + i], i % 32 < 12 ? i + 21 : 0u);
  const Words left = run(kFirst + kInit + load_at(-4) + kWait + kStore + kStored + "AFTER:");
  for (uint32_t i = 0; i < 256; ++i) CHECK_EQ(left[256 + i], i % 32 < 4 ? 0u : i - 3);
}

TEST(a_swizzle_moves_chunks_of_16_bytes) {
  const Words w = run(kFirst + kInit + load_at(0) + kWait +
                          "ld.shared.u32 %r4, [%r1+128]; st.global.u32 [%rd1], %r4;\nAFTER:",
                      launch_of(32), 3);
  CHECK_EQ(w[0], 32u + 4 + 1);  // of row 1 the second chunk is first
}

TEST(copies_that_are_not_waited_for_are_races) {
  const std::string read = "ld.shared.u32 %r4, [%r1];\n";
  CHECK_THROWS(run(kFirst + kInit + load_at(0) + read + "AFTER:", launch_of(32, true)),
               "before the end of an asynchronous write of bytes 0 to 1023");
  CHECK_THROWS(run(kFirst + kInit + load_at(0) + "AFTER:", launch_of(32, true)),
               "ends before a copy to its shared memory has landed");
  const std::string stored = kFirst + kInit + load_at(0) + kWait + kStore;
  CHECK_THROWS(run(stored + "st.shared.u32 [%r1], %r0;\nAFTER:"),
               "before the end of an asynchronous read");
  CHECK_THROWS(run(stored + "AFTER:"), "ends before copies of thread 0");
}

TEST(the_async_proxy_sees_what_was_written_behind_a_fence) {
  const std::string write = kFirst + "st.shared.u32 [%r1], 7;\n";
  const std::string fence = "fence.proxy.async.shared::cta;\n";
  CHECK_EQ(run(write + fence + kStore + kStored + "AFTER:")[256], 7u);
  CHECK_THROWS(run(write + kStore + kStored + "AFTER:"), "no fence.proxy.async after it");
}

TEST(copies_of_threads_land_before_the_mbarrier_that_is_told) {
  const std::string copy =
      "shl.b32 %r4, %r0, 2; add.s32 %r5, %r1, %r4; mul.wide.u32 %rd4, %r0, 4;\n"
      "add.s64 %rd4, %rd1, %rd4; cp.async.ca.shared.global.L2::128B [%r5+64], [%rd4], 4;\n";
  const std::string init =
      "setp.ne.s32 %p1, %r0, 0; @%p1 bra READY;\n"
      "mbarrier.init.shared::cta.b64 [%r2], 32;\nREADY: bar.sync 0;\n";
  const std::string tell = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];\n";
  const std::string read = "ld.shared.u32 %r6, [%r5+64]; st.global.u32 [%rd4+1024], %r6;\n";
  for (const bool late : {false, true}) {
    const Words w = run(init + copy + tell + kWait + read, launch_of(32, late));
    for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(w[256 + i], i + 1);
    CHECK_THROWS(run(init + copy + tell + "mov.u32 %r6, 0;", launch_of(32, true)),
                 "ends before a copy to its shared memory has landed");
    CHECK_THROWS(run(init + copy, launch_of(32, late)), "were told to no mbarrier");
  }
  CHECK_THROWS(run(init + copy + tell + read, launch_of(32, true)),
               "before the end of an asynchronous write");
  CHECK_THROWS(run("cp.async.ca.shared.global [%r1+2], [%rd1], 4;"), "no multiples of that");
  CHECK_THROWS(run("cp.async.ca.shared.global [%r1], [%rd1], 12;"), "not 4, 8 or 16");
  CHECK_THROWS(run("add.s64 %rd4, %rd1, 2048; cp.async.ca.shared.global [%r1], [%rd4], 4;"),
               "outside of every buffer");
}

// Thread t copies 16 bytes, of which it reads 16 or, where `size` says so, fewer.
std::string copy_group(const std::string& size, const std::string& wait, const std::string& bar) {
  return "shl.b32 %r4, %r0, 4; add.s32 %r5, %r1, %r4; mul.wide.u32 %rd4, %r0, 16;\n"
         "add.s64 %rd4, %rd1, %rd4; setp.lt.u32 %p3, %r0, 20; selp.u32 %r7, 16, " +
         size +
         ", %p3;\ncp.async.cg.shared.global.L2::128B [%r5], [%rd4], 16, %r7;\n"
         "cp.async.commit_group;\n" +
         wait + bar +
         "xor.b32 %r8, %r4, 496; add.s32 %r8, %r1, %r8; ld.shared.u32 %r6, [%r8+4];\n"
         "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd1, %rd5; st.global.u32 [%rd5+1024], %r6;\n";
}

TEST(copies_of_threads_land_before_the_wait_for_their_group) {
  const std::string wait = "cp.async.wait_group 0;\n", bar = "bar.sync 0;\n";
  for (const char* size : {"0", "4", "16"}) {
    const Words w = run(copy_group(size, wait, bar), launch_of(32));
    for (uint32_t i = 0; i < 32; ++i)  // of thread 31 - i, the second word
      CHECK_EQ(w[256 + i], 31 - i < 20 || size == std::string("16") ? (31 - i) * 4 + 2 : 0u);
  }
  CHECK_THROWS(run(copy_group("0", "", bar)), "before the end of an asynchronous write");
  CHECK_THROWS(run(copy_group("0", "cp.async.wait_group 1;\n", bar)),
               "before the end of an asynchronous write");
  CHECK_THROWS(run(copy_group("0", wait, "")), "with no barrier between");
  CHECK_THROWS(run(copy_group("0", bar, wait)), "with no barrier between");
  CHECK_THROWS(run(copy_group("17", wait, bar)), "of 16 bytes that reads 17");
  CHECK_THROWS(run(kFirst + "cp.async.ca.shared.global [%r1], [%rd1], 4;\n"
                            "cp.async.commit_group;\nAFTER:"),
               "ends before copies of thread 0");
  CHECK_THROWS(run("ld.shared.u32 %r4, [%r1]; setp.ne.s32 %p1, %r0, 1; @%p1 bra AFTER;\n"
                   "cp.async.ca.shared.global [%r1], [%rd1], 4;\nAFTER:"),
               "which several threads read");
  CHECK_THROWS(run("cp.async.cg.shared.global [%r1], [%rd1], 8;"), "past L1 of 8 bytes");
}

TEST(mbarriers_end_their_phase_with_the_last_arrival_and_byte) {
  const std::string two = "mbarrier.init.shared::cta.b64 [%r2], 2;\n";
  const std::string arrive = "mbarrier.arrive.shared::cta.b64 _, [%r2];\n";
  run(kFirst + two + arrive + arrive + kWait + "AFTER:");
  CHECK_THROWS(run(kFirst + two + arrive + kWait + "AFTER:"), "a block hangs: 1 of 32 threads");
  CHECK_THROWS(run(kFirst + two + arrive + kWait + "AFTER:"), "lanes wait at line");
  CHECK_THROWS(run(kFirst + arrive + "AFTER:"), "there is no mbarrier at byte 1024");
  CHECK_THROWS(run(kFirst + two + "mbarrier.arrive.shared::cta.b64 _, [%r2], 3;\nAFTER:"),
               "more arrivals than the 2 it expects");
}

TEST(a_grid_of_three_dimensions_in_clusters) {
  const Words w = run(kFirst +
                          "mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z;\n"
                          "mad.lo.s32 %r6, %r5, 3, %r4; mad.lo.s32 %r6, %r6, 2, %r3;\n"
                          "mov.u32 %r7, %cluster_ctarank; mov.u32 %r8, %clusterid.y;\n"
                          "mad.lo.s32 %r7, %r8, 10, %r7; mul.wide.u32 %rd4, %r6, 4;\n"
                          "add.s64 %rd4, %rd1, %rd4; st.global.u32 [%rd4], %r7;\nAFTER:",
                      pair());
  for (uint32_t i = 0; i < 12; ++i) CHECK_EQ(w[i], i % 2 + i / 2 % 3 * 10);
  ptx::Launch odd = pair();
  odd.grid.x = 3;
  CHECK_THROWS(run("", odd), "a grid of 3 x 3 x 2 is no multiple of its clusters of 2 x 1 x 1");
}

TEST(ctas_of_a_cluster_arrive_at_each_others_mbarriers) {
  const std::string meet = "barrier.cluster.arrive; barrier.cluster.wait;\n";
  const std::string peer =
      "mov.u32 %r4, %cluster_ctarank; xor.b32 %r4, %r4, 1;\n"
      "mapa.shared::cluster.u32 %r5, %r2, %r4; mbarrier.arrive.shared::cluster.b64 _, [%r5];\n";
  const std::string init = "setp.ne.s32 %p1, %r0, 0; @%p1 bra READY;\n" + kInit + "READY: ";
  const std::string rest = "@%p1 bra AFTER;\n" + peer + kWait + "AFTER: ";
  for (const int late : {-1, 0, 1}) {
    ptx::Launch l = pair();
    l.timing.late_cta = late;
    run(init + meet + rest + meet, l);
    if (late >= 0) CHECK_THROWS(run(init + rest + meet, l), "there is no mbarrier at byte 1024");
  }
}

TEST(matrices_go_through_shared_memory) {
  const Words w =
      run("shl.b32 %r3, %r0, 4; add.s32 %r3, %r1, %r3; add.s32 %r5, %r0, 100;\n"
          "stmatrix.sync.aligned.x4.m8n8.shared.b16 [%r3], {%r0, %r5, %r0, %r0};\n"
          "ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r6, %r7, %r8, %r9}, [%r3];\n"
          "bar.sync 0;\n"
          "mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd1, %rd4; st.global.u32 [%rd4], %r7;\n"
          "shl.b32 %r10, %r0, 2; add.s32 %r10, %r1, %r10; ld.shared.u32 %r11, [%r10+128];\n"
          "st.global.u32 [%rd4+128], %r11;");
  for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(w[i], i + 100);
  for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(w[32 + i], i + 100);
}

TEST(one_lane_is_elected) {
  const Words w =
      run("elect.sync %r3|%p3, -1; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd1, %rd4;\n"
          "selp.u32 %r4, 1, 0, %p3; st.global.u32 [%rd4], %r4;");
  for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(w[i], uint32_t(i == 0));
}

TEST(tensor_maps_keep_the_rules_of_the_driver) {
  const uint64_t sizes[] = {32, 16}, strides[] = {128}, odd_strides[] = {120};
  const uint32_t box[] = {32, 8}, steps[] = {1, 1}, large[] = {32, 257}, thin[] = {3, 8};
  const ptx::TensorMapRequest good = {4, 2, 256, sizes, strides, box, steps, false, 3};
  ptx::encode(good);
  const auto broken = [&](auto change) {
    ptx::TensorMapRequest r = good;
    change(r);
    ptx::encode(r);
  };
  using R = ptx::TensorMapRequest;
  CHECK_THROWS(broken([](R& r) { r.address = 264; }), "a multiple of 16, got 264");
  CHECK_THROWS(broken([&](R& r) { r.strides = odd_strides; }), "a multiple of 16 below 2^40");
  CHECK_THROWS(broken([&](R& r) { r.box = large; }), "257 elements, not 1 to 256");
  CHECK_THROWS(broken([&](R& r) { r.box = thin; }), "a box of 12 bytes");
  CHECK_THROWS(broken([](R& r) { r.swizzle = 2; }), "wider than its swizzle of 64");
  CHECK_THROWS(broken([](R& r) { r.rank = 6; }), "1 to 5 axes, got 6");
}

// Codes of both formats, none of which is infinite or NaN.
Words random_codes() {
  Words words(512);
  for (uint32_t i = 0; i < 512; ++i) words[i] = random_bits(5, i) & 0xbbbbbbbb;
  return words;
}

// Row-major A [16, 32] lies at words, B [8, 32] at word 128; D goes to word 256.
TEST(a_warp_multiplies_what_its_lanes_hold) {
  const std::string load =
      "shr.u32 %r3, %r0, 2; and.b32 %r4, %r0, 3; shl.b32 %r4, %r4, 2;\n"
      "mad.lo.s32 %r5, %r3, 32, %r4; cvt.u64.u32 %rd4, %r5; add.s64 %rd4, %rd1, %rd4;\n"
      "ld.global.u32 %r6, [%rd4]; ld.global.u32 %r7, [%rd4+256];\n"
      "ld.global.u32 %r8, [%rd4+16]; ld.global.u32 %r9, [%rd4+272];\n"
      "ld.global.u32 %r10, [%rd4+512]; ld.global.u32 %r11, [%rd4+528];\n"
      "mov.f32 %f4, 0f3F800000; mov.f32 %f5, 0f40000000;\n";
  const std::string store =
      "shl.b32 %r4, %r4, 1; mad.lo.s32 %r5, %r3, 32, %r4; cvt.u64.u32 %rd4, %r5;\n"
      "add.s64 %rd4, %rd1, %rd4; st.global.v2.f32 [%rd4+1024], {%f0, %f1};\n"
      "st.global.v2.f32 [%rd4+1280], {%f2, %f3};\n";
  for (const bool second_a : {false, true})
    for (const bool second_b : {false, true}) {
      const auto name = [](bool second) { return std::string(second ? "e5m2" : "e4m3"); };
      const Words w = run(load + "mma.sync.aligned.m16n8k32.row.col.f32." + name(second_a) + "." +
                              name(second_b) +
                              ".f32 {%f0, %f1, %f2, %f3}, {%r6, %r7, %r8, %r9}, {%r10, %r11}, "
                              "{%f4, %f5, %f5, %f4};\n" +
                              store,
                          launch_of(32), 0, random_codes());
      const auto* bytes = reinterpret_cast<const unsigned char*>(w.data());
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
          double sum = (row < 8) == (column % 2 == 0) ? 1 : 2;
          for (int k = 0; k < 32; ++k)
            sum += double(ptx::fp8_values(second_a)[bytes[row * 32 + k]]) *
                   double(ptx::fp8_values(second_b)[bytes[512 + column * 32 + k]]);
          CHECK_EQ(ptx::float_of(w[256 + row * 8 + column]), static_cast<float>(sum));
        }
    }
  CHECK_THROWS(run("setp.ne.s32 %p1, %r0, 0; @%p1 mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3"
                   ".f32 {%f0, %f1, %f2, %f3}, {%r6, %r7, %r8, %r9}, {%r6, %r7}, "
                   "{%f0, %f1, %f2, %f3};"),
               "skip an instruction that is .aligned");
  CHECK_THROWS(run("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, "
                   "{%r6, %r7, %r8, %r9}, {%r6, %r7}, {%f0, %f1, %f2, %f3};"),
               "not supported");
}

TEST(tensor_cores_cut_addends_below_the_largest) {
  static float b[ptx::kProductDepth][ptx::kProductColumns];
  float a[ptx::kProductDepth] = {1, 1};
  b[0][0] = 1;
  b[1][0] = 0x1.8p-13f;  // of which 13 bits below 1 keep one
  b[1][1] = 0x1.8p-13f;  // alone
  float exact[2] = {1, 0}, cut[2] = {1, 0};
  ptx::add_exact(exact, a, b, 2);
  ptx::add_cut(cut, a, b, 2);
  CHECK_EQ(exact[0], 2 + 0x1.8p-13f);
  CHECK_EQ(cut[0], 2 + 0x1p-13f);
  CHECK_EQ(exact[1], 0x1.8p-13f);
  CHECK_EQ(cut[1], 0x1.8p-13f);
}
