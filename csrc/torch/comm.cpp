// NCCL communicators as torch ops. A communicator is a number, which is invalid after comm_abort
// or comm_close.
#include "quaver/comm.h"

#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "device.h"

namespace quaver::binding {
namespace {

// `host`: over host memory, which a stand-in for NCCL moves and NCCL itself does not.
struct Entry {
  std::shared_ptr<comm::Communicator> communicator;
  bool host = false;

  comm::Communicator* operator->() const { return communicator.get(); }
};

// Never destroyed: at the end of the process CUDA may be gone already.
struct Table {
  std::mutex mutex;
  std::map<int64_t, Entry> open;
  int64_t last = 0;
};

Table& table() {
  static auto& all = *new Table;
  return all;
}

Entry find(const char* op, int64_t number) {
  const std::lock_guard<std::mutex> lock(table().mutex);
  const auto known = table().open.find(number);
  QUAVER_CHECK(known != table().open.end(), op, ": there is no communicator ", number);
  return known->second;
}

// The bytes of a tensor that goes to or comes from other ranks.
int64_t bytes_of(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return t.numel() * t.element_size();
}

comm::UniqueId id_of(const char* op, const Tensor& id) {
  comm::UniqueId out;
  QUAVER_CHECK(id.scalar_type() == ScalarType::Byte && id.is_contiguous() &&
                   id.numel() == int64_t(sizeof(out.bytes)),
               op, ": id must be ", sizeof(out.bytes), " uint8 on the CPU, got ", id.numel(),
               " of ", torch::headeronly::toString(id.scalar_type()));
  std::memcpy(out.bytes, id.data_ptr(), sizeof(out.bytes));
  return out;
}

void comm_id_(Tensor id, const Word& library) {
  id_of("comm_id_", id);
  const comm::UniqueId made = comm::make_unique_id(library.text.c_str());
  std::memcpy(id.data_ptr(), made.bytes, sizeof(made.bytes));
}

int64_t comm_create(const Tensor& id, int64_t rank, int64_t size, double timeout,
                    const Word& library, bool host) {
  QUAVER_CHECK(size > 0 && size <= std::numeric_limits<int>::max() && rank >= 0 && rank < size,
               "comm_create: wanted a rank in [0, size), got rank ", rank, " of ", size);
  auto made =
      std::make_shared<comm::Communicator>(id_of("comm_create", id), static_cast<int>(rank),
                                           static_cast<int>(size), timeout, library.text.c_str());
  const std::lock_guard<std::mutex> lock(table().mutex);
  table().open.emplace(++table().last, Entry{std::move(made), host});
  return table().last;
}

template <class Run>
void on_comm_device(const char* op, const Entry& c, const Tensor& t, Run run) {
  QUAVER_CHECK(t.is_cpu() == c.host, op, ": wanted tensors on ", c.host ? "the cpu" : "cuda",
               ", got ", device_name(t));
  on_device(op, t, [&] { run(nullptr); }, run);
}

std::string list_of(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// One part a rank, which together are the whole tensor.
void check_parts(const char* op, const char* name, const std::vector<int64_t>& parts, int size,
                 int64_t bytes) {
  int64_t total = 0;
  bool valid = static_cast<int>(parts.size()) == size;
  for (const int64_t part : parts) {
    valid = valid && part >= 0 && part <= bytes - total;
    if (valid) total += part;
  }
  QUAVER_CHECK(valid && total == bytes, op, ": wanted ", size, " parts of ", name, ", which has ",
               bytes, " bytes, got ", list_of(parts));
}

void comm_all_to_all_(int64_t number, const Tensor& send, std::vector<int64_t> send_bytes,
                      Tensor recv, std::vector<int64_t> recv_bytes) {
  const char* op = "comm_all_to_all_";
  const Entry c = find(op, number);
  check_device(op, send, "recv", recv);
  check_parts(op, "send", send_bytes, c->size(), bytes_of(op, "send", send));
  check_parts(op, "recv", recv_bytes, c->size(), bytes_of(op, "recv", recv));
  QUAVER_CHECK(send_bytes[c->rank()] == recv_bytes[c->rank()], op, ": wanted as much from rank ",
               c->rank(), " as goes to it, which is itself, got ", recv_bytes[c->rank()], " and ",
               send_bytes[c->rank()], " bytes");
  const auto run = [&](void* stream) {
    c->all_to_all(send.data_ptr(), send_bytes.data(), recv.data_ptr(), recv_bytes.data(), stream);
  };
  on_comm_device(op, c, send, run);
}

void comm_all_gather_(int64_t number, const Tensor& send, Tensor recv) {
  const char* op = "comm_all_gather_";
  const Entry c = find(op, number);
  const int64_t bytes = bytes_of(op, "send", send);
  check_device(op, send, "recv", recv);
  QUAVER_CHECK(bytes_of(op, "recv", recv) == bytes * c->size(), op, ": wanted a recv of ",
               bytes * c->size(), " bytes for ", c->size(), " ranks, got ",
               bytes_of(op, "recv", recv));
  const auto run = [&](void* stream) {
    c->all_gather(send.data_ptr(), recv.data_ptr(), bytes, stream);
  };
  on_comm_device(op, c, send, run);
}

void comm_broadcast_(int64_t number, Tensor values, int64_t root) {
  const char* op = "comm_broadcast_";
  const Entry c = find(op, number);
  const int64_t bytes = bytes_of(op, "values", values);
  QUAVER_CHECK(root >= 0 && root < c->size(), op, ": wanted a root in [0, ", c->size(), "), got ",
               root);
  const auto run = [&](void* stream) {
    c->broadcast(values.data_ptr(), bytes, static_cast<int>(root), stream);
  };
  on_comm_device(op, c, values, run);
}

void comm_all_reduce_(int64_t number, Tensor values, const Word& reduction) {
  const char* op = "comm_all_reduce_";
  const Entry c = find(op, number);
  QUAVER_CHECK(reduction.text == "sum" || reduction.text == "max", op,
               ": reduction must be sum or max, got ", reduction.text);
  const TensorView v = view(op, "values", values);
  const auto how = reduction.text == "sum" ? comm::Reduction::sum : comm::Reduction::max;
  const auto run = [&](void* stream) { c->all_reduce(v.data, v.numel(), v.dtype, how, stream); };
  on_comm_device(op, c, values, run);
}

bool comm_sums_fp8(int64_t number) { return find("comm_sums_fp8", number)->sums_fp8(); }

void comm_check(int64_t number) { find("comm_check", number)->check(); }

void forget(int64_t number) {
  const std::lock_guard<std::mutex> lock(table().mutex);
  table().open.erase(number);
}

void comm_abort(int64_t number) {
  find("comm_abort", number)->abort();
  forget(number);
}

void comm_close(int64_t number) {
  find("comm_close", number);
  forget(number);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("comm_id_", TORCH_BOX(&comm_id_));
  m.impl("comm_create", TORCH_BOX(&comm_create));
  m.impl("comm_all_to_all_", TORCH_BOX(&comm_all_to_all_));
  m.impl("comm_all_gather_", TORCH_BOX(&comm_all_gather_));
  m.impl("comm_broadcast_", TORCH_BOX(&comm_broadcast_));
  m.impl("comm_all_reduce_", TORCH_BOX(&comm_all_reduce_));
}
STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m) {
  m.impl("comm_all_to_all_", TORCH_BOX(&comm_all_to_all_));
  m.impl("comm_all_gather_", TORCH_BOX(&comm_all_gather_));
  m.impl("comm_broadcast_", TORCH_BOX(&comm_broadcast_));
  m.impl("comm_all_reduce_", TORCH_BOX(&comm_all_reduce_));
}
// These take no tensor to choose a device by.
STABLE_TORCH_LIBRARY_IMPL(quaver, CompositeExplicitAutograd, m) {
  m.impl("comm_sums_fp8", TORCH_BOX(&comm_sums_fp8));
  m.impl("comm_check", TORCH_BOX(&comm_check));
  m.impl("comm_abort", TORCH_BOX(&comm_abort));
  m.impl("comm_close", TORCH_BOX(&comm_close));
}

}  // namespace quaver::binding
