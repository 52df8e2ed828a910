// PTX as parsed: kernels, their registers, parameters and memory, and statements whose operands are
// resolved. PTX ISA 9.0, https://docs.nvidia.com/cuda/parallel-thread-execution.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quaver::ptx {

constexpr int kLanes = 32;

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  int64_t count() const { return int64_t(x) * y * z; }
};

enum class Type : uint8_t {
  none,
  pred,
  b8,
  u8,
  s8,
  b16,
  u16,
  s16,
  f16,
  bf16,
  b32,
  u32,
  s32,
  f32,
  f16x2,
  bf16x2,
  e4m3x2,
  e5m2x2,
  b64,
  u64,
  s64,
  f64,
};

// Bytes of a value; a predicate has none, it is a bit of its warp.
int size_of(Type type);
bool is_signed(Type type);
// Type::none where `name` is no type.
Type type_of(const std::string& name);

enum class Space : uint8_t { generic, global, shared, local, param };

// Generic addresses of shared and local memory lie in windows that no host pointer is in.
constexpr uint64_t kSharedWindow = 0xf1ull << 56, kLocalWindow = 0xf2ull << 56;
constexpr uint64_t kWindowMask = 0xffull << 56;

struct Operand {
  enum class Kind : uint8_t { sink, reg, special, immediate, symbol, label, memory, vector };
  Kind kind = Kind::sink;
  bool negated = false;         // a predicate, by `!`
  Space space = Space::global;  // of a symbol
  int reg = -1;
  uint64_t value = 0;  // of an immediate; of a symbol its address; of memory the displacement
  std::string name;    // of a special register or a label
  std::vector<Operand> parts;
};

struct Statement {
  int line = 0;
  std::string text;
  int guard = -1;  // a predicate register
  bool guard_negated = false;
  std::vector<std::string> opcode;  // what dots separate
  std::vector<Operand> operands;
  int target = -1;  // of a branch: the index of a statement
  bool has(const char* modifier) const;
};

struct Parameter {
  std::string name;
  uint64_t offset, bytes;
};

struct Kernel {
  std::string name;
  int line = 0;
  std::vector<Parameter> parameters;
  uint64_t parameter_bytes = 0;
  std::vector<Type> registers;
  std::vector<Statement> body;
  uint64_t shared_bytes = 0, local_bytes = 0;
  uint64_t dynamic_shared = 0;  // where it starts; after what is static
};

}  // namespace quaver::ptx
