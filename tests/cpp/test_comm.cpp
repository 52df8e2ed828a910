// csrc/comm over a stand-in for NCCL (nccl/stand_in.cpp), which it opens as it would open NCCL.
#include <dlfcn.h>

#include <algorithm>
#include <functional>
#include <thread>

#include "quaver/comm.h"
#include "quaver/fp8.h"
#include "test.h"

using namespace quaver;
using comm::Communicator;

namespace {

constexpr const char* kLibrary = QUAVER_NCCL_STAND_IN;
constexpr double kPatience = 20.0;  // s; only a test that fails waits for it

template <class Function>
Function* stand_in(const char* name) {
  return reinterpret_cast<Function*>(dlsym(dlopen(kLibrary, RTLD_NOW), name));
}

// Runs body(communicator) as every rank of a new world; returns each rank's error, or "".
std::vector<std::string> ranks(int size, const std::function<void(Communicator&)>& body) {
  const comm::UniqueId id = comm::make_unique_id(kLibrary);
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      try {
        Communicator c(id, rank, size, kPatience, kLibrary);
        body(c);
      } catch (const test::Failure& failure) {
        errors[rank] = failure.message;
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  for (std::thread& thread : threads) thread.join();
  return errors;
}

void all_well(const std::vector<std::string>& errors) {
  for (const std::string& error : errors) CHECK_EQ(error, std::string());
}

uint8_t message(int from, int to, int i) { return static_cast<uint8_t>(from * 50 + to * 7 + i); }

}  // namespace

TEST(all_to_all_sends_each_rank_its_part) {
  const auto part = [](int from, int to) { return int64_t((from + 2 * to) % 4); };  // bytes; some 0
  for (int size : {1, 2, 3, 5})
    all_well(ranks(size, [&](Communicator& c) {
      std::vector<uint8_t> send, wanted;
      std::vector<int64_t> out, in;
      for (int p = 0; p < size; ++p) {
        out.push_back(part(c.rank(), p));
        in.push_back(part(p, c.rank()));
        for (int i = 0; i < out[p]; ++i) send.push_back(message(c.rank(), p, i));
        for (int i = 0; i < in[p]; ++i) wanted.push_back(message(p, c.rank(), i));
      }
      std::vector<uint8_t> recv(wanted.size());
      c.all_to_all(send.data(), out.data(), recv.data(), in.data(), nullptr);
      CHECK(recv == wanted);
      const std::vector<int64_t> none(size);
      c.all_to_all(nullptr, none.data(), nullptr, none.data(), nullptr);
      c.check();
    }));
}

TEST(all_to_all_between_two_needs_no_third) {
  all_well(ranks(3, [](Communicator& c) {
    uint8_t x = static_cast<uint8_t>(10 + c.rank());
    const int64_t none[3] = {}, zero[3] = {1, 0, 0}, two[3] = {0, 0, 1};
    if (c.rank() == 2) c.all_to_all(&x, zero, nullptr, none, nullptr);
    if (c.rank() == 0) {
      c.all_to_all(nullptr, none, &x, two, nullptr);
      CHECK_EQ(x, 12);
    }
  }));
}

TEST(broadcast_overwrites_with_the_roots) {
  all_well(ranks(3, [](Communicator& c) {
    uint8_t x[2] = {uint8_t(c.rank()), uint8_t(7 * c.rank())};
    c.broadcast(x, 2, 1, nullptr);
    CHECK_EQ(x[0], 1);
    CHECK_EQ(x[1], 7);
    c.broadcast(nullptr, 0, 2, nullptr);
    CHECK_THROWS(c.broadcast(x, 2, 3, nullptr), "wanted a root in [0, 3), got 3");
  }));
}

TEST(all_gather_keeps_the_order_of_ranks) {
  all_well(ranks(4, [](Communicator& c) {
    const uint8_t mine[2] = {uint8_t(c.rank()), uint8_t(10 + c.rank())};
    uint8_t all[8] = {};
    c.all_gather(mine, all, 2, nullptr);
    for (int p = 0; p < 4; ++p) {
      CHECK_EQ(all[2 * p], p);
      CHECK_EQ(all[2 * p + 1], 10 + p);
    }
  }));
}

TEST(all_reduce_in_place) {
  all_well(ranks(3, [](Communicator& c) {
    float x[2] = {float(c.rank()), -float(c.rank())};
    c.all_reduce(x, 2, DType::f32, comm::Reduction::max, nullptr);
    CHECK_EQ(x[0], 2.0f);
    CHECK_EQ(x[1], 0.0f);
    float y[1] = {float(1 + c.rank())};
    c.all_reduce(y, 1, DType::f32, comm::Reduction::sum, nullptr);
    CHECK_EQ(y[0], 6.0f);
    // FP8 is rounded, and saturated, at every addition: 16 + 1 is 16 twice, not 18.
    e4m3 z[2] = {encode_nearest<e4m3>(c.rank() == 0 ? 16.0f : 1.0f), encode_nearest<e4m3>(448.0f)};
    c.all_reduce(z, 2, DType::e4m3, comm::Reduction::sum, nullptr);
    CHECK_EQ(decode(z[0]), 16.0f);
    CHECK_EQ(decode(z[1]), 448.0f);
  }));
}

TEST(a_failed_operation_aborts_and_every_later_use_says_so) {
  const auto errors = ranks(1, [](Communicator& c) {
    float x = 1.0f;
    // The stand-in refuses 16-bit types.
    CHECK_THROWS(c.all_reduce(&x, 1, DType::bf16, comm::Reduction::sum, nullptr),
                 "all_reduce: NCCL refused on rank 0 of 1: invalid argument");
    CHECK_THROWS(c.all_gather(&x, &x, 4, nullptr), "was aborted");
    CHECK_THROWS(c.check(), "was aborted");
  });
  all_well(errors);
}

TEST(a_peer_that_dies_is_an_error_and_not_a_hang) {
  auto* fail_rank = stand_in<void(int)>("stand_in_fail");
  all_well(ranks(1, [&](Communicator& c) {
    c.check();
    fail_rank(0);
    CHECK_THROWS(c.check(), "NCCL failed on rank 0 of 1: remote process exited");
    fail_rank(-1);
  }));
}

TEST(a_peer_that_never_comes_is_a_timeout) {
  const comm::UniqueId id = comm::make_unique_id(kLibrary);
  CHECK_THROWS(Communicator(id, 0, 2, 0.05, kLibrary), "rank 0 of 2 waited 0.05 s for a peer");
}

TEST(abort_from_another_thread_frees_one_that_waits) {
  const auto errors = ranks(2, [](Communicator& c) {
    if (c.rank() == 1) return;  // leaves rank 0 waiting for its message, alive as it is
    std::thread watchdog([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      c.abort();
    });
    uint8_t send[2] = {}, recv[2] = {};
    std::string error;
    try {
      const int64_t one[2] = {1, 1};
      c.all_to_all(send, one, recv, one, nullptr);
    } catch (const std::exception& e) {
      error = e.what();
    }
    watchdog.join();
    CHECK(error.find("was aborted") != std::string::npos);
  });
  all_well(errors);
}

// A sleep would cost a message a millisecond, where NCCL takes it in within tens of microseconds.
TEST(a_short_message_is_not_slept_for) {
  auto* polls = stand_in<int()>("stand_in_polls");
  auto* delay = stand_in<void(int)>("stand_in_delay");
  delay(100);
  all_well(ranks(1, [&](Communicator& c) {
    int most = 0;  // of one message; a busy machine interrupts many
    for (int i = 0; i < 2000 && most <= 3; ++i) {
      uint8_t value = 1;
      polls();
      c.broadcast(&value, 1, 0, nullptr);
      most = std::max(most, polls());
    }
    CHECK(most > 3);
  }));
  delay(0);
}

TEST(bad_arguments_are_named) {
  const comm::UniqueId id = comm::make_unique_id(kLibrary);
  CHECK_THROWS(Communicator(id, 2, 2, 1.0, kLibrary),
               "wanted a rank in [0, size), got rank 2 of 2");
  CHECK_THROWS(Communicator(id, 0, 1, 0.0, kLibrary), "timeout must be positive");
  CHECK_THROWS(Communicator(comm::UniqueId{}, 0, 1, 1.0, kLibrary), "NCCL refused rank 0 of 1");
  all_well(ranks(1, [](Communicator& c) {
    const int64_t bytes = -1;
    CHECK_THROWS(c.all_to_all(nullptr, &bytes, nullptr, &bytes, nullptr), "got -1");
  }));
}

TEST(a_library_that_is_missing_or_foreign_is_named) {
  CHECK_THROWS(comm::nccl_version("libnccl-that-is-not-there.so"), "libnccl-that-is-not-there.so");
  CHECK_THROWS(comm::nccl_version("libm.so.6"), "has no ncclGetVersion");
  CHECK_EQ(comm::nccl_version(kLibrary), 22809);
}

// Under another name it is opened anew.
TEST(a_library_that_is_too_old_is_refused) {
  auto* version = stand_in<void(int)>("stand_in_version");
  version(21003);
  const std::string other = std::string(kLibrary).insert(std::string(kLibrary).rfind('/'), "/.");
  std::string error;
  try {
    comm::nccl_version(other.c_str());
  } catch (const std::exception& e) {
    error = e.what();
  }
  version(22809);
  CHECK(error.find("is NCCL 21003; wanted 21400") != std::string::npos);
}
