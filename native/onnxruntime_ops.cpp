// What stands between a step's products, for ONNX Runtime: one launch where its CUDA provider has many, and attention
// of the prefix form, on the host.
//
// Functions of our graphs (diagd/export/tracing.py) have these names; a provider that has an operator of the name
// runs that, others put the function's nodes in its place. A name stays what it was: older graphs had "Heads..",
// "Attend" and "Mask" with other inputs, which none may have again. Declared here is what is used of ONNX Runtime's C
// interface, whose structures only grow at their ends (include/onnxruntime/core/session/onnxruntime_c_api.h).
#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "layer.h"
#include "prefix_attention.h"
#include "products.h"

namespace diagd {

enum Function { kNormRow, kSwiGLU, kGELU, kEmbedRow, kAttend, kFunctions };

using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                       void* stream, void**, void**);

// What sessions are given, from Python: functions of loaded modules, zeroed memory between blocks of attention. On the
// host there are neither, and processors are threads.
struct Operators {
  void* functions[kFunctions];  // null: none
  char* between;         // of bytes_between()
  Launch launch;         // null: cuLaunchKernel
  const char* provider;  // null: CUDA's
  Processors gpu;
  int32_t size;
};

}  // namespace diagd

namespace {

constexpr uint32_t kApiVersion = 17;  // ONNX Runtime 1.17: the first with all that is used
constexpr int kFloat32 = 1, kUInt8 = 2, kInt8 = 3, kFloat16 = 10, kInt32 = 6, kInt64 = 7;
constexpr int kRequired = 0, kOptional = 1, kDeviceMemory = 0;
constexpr size_t kMostInputs = 12;

using Status = void*;  // null: all is well

// OrtApi: functions by their place among its members.
enum Place : size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInteger = 86,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelContextGetGpuComputeStream = 193,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
};

struct ApiBase {
  const void* const* (*get)(uint32_t version);
};

template <typename... Arguments>
Status call(const void* const* api, Place place, Arguments... arguments) {
  return reinterpret_cast<Status (*)(Arguments...)>(const_cast<void*>(api[place]))(arguments...);
}

Status failed(const void* const* api, const char* what) { return call(api, kCreateStatus, int{1}, what); }

constexpr char kNoMemory[] = "diagd: no memory";

struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const void* const*, const void*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*inputs)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*outputs)(const CustomOp*);
  void (*compute)(void*, void*);
  void (*destroy)(void*);
  int (*input_kind)(const CustomOp*, size_t);
  int (*output_kind)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_same)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_same)(const CustomOp*);
  Status (*create_checked)(const CustomOp*, const void* const*, const void*, void**);
  Status (*compute_checked)(void*, void*);
  Status (*infer_shape)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  void* later[4];  // of aliases, none
};

struct Call;

// An operator: its inputs are `floating`, but for the first `integers` and, where it has a place to write, the last; of
// a product of eight bits the weight, and the last, a zero point.
struct Operator : CustomOp {
  char label[32];
  size_t least, most;  // inputs
  size_t results;
  size_t integers;
  bool writes;
  int weight;  // type of the second input, which is constant; 0: it is not
  int floating;
  const char* provider_name;
  const char* real;  // attributes, null where it has none
  const char* wholes[2];
  Status (*run)(Call&);
  diagd::Operators given;

  bool has(const char* part) const { return std::strstr(label, part) != nullptr; }
  int type(size_t input) const {
    if (writes && input + 1 == most) return kInt64;
    if (weight && input == 1) return weight;
    if (weight == kInt8 && input == 4) return kUInt8;
    return input < integers ? kInt32 : floating;
  }
};

struct Kernel {
  const Operator* op;
  const void* const* api;
  float real;
  int64_t wholes[2];
  std::unique_ptr<const diagd::FloatWeight> floats;
  std::unique_ptr<const diagd::Int8Weight> bytes;
};

// cuLaunchKernel of the driver, where there is one.
diagd::Launch launcher() {
#if defined(_WIN32)
  static const HMODULE driver = LoadLibraryA("nvcuda.dll");
  static void* const found = driver ? reinterpret_cast<void*>(GetProcAddress(driver, "cuLaunchKernel")) : nullptr;
#else
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  static void* const found = driver ? dlsym(driver, "cuLaunchKernel") : nullptr;
#endif
  return reinterpret_cast<diagd::Launch>(found);
}

struct Shaped {
  void* data = nullptr;
  size_t axes = 0;
  int64_t shape[4] = {1, 1, 1, 1};  // aligned at the end

  const half* halves() const { return static_cast<const half*>(data); }
  float* floats() const { return static_cast<float*>(data); }
  int64_t columns() const { return shape[3]; }
  int64_t rows() const { return shape[0] * shape[1] * shape[2]; }
  bool is(int64_t of_rows, int64_t of_columns) const { return rows() == of_rows && columns() == of_columns; }
  bool is_like(const Shaped& other) const { return std::equal(shape, shape + 4, other.shape); }
};

// One run of an operator.
struct Call {
  const Kernel& kernel;
  void* context;
  void* stream = nullptr;
  size_t count = 0;
  Shaped inputs[kMostInputs] = {};

  Status fail(const char* what) const { return failed(kernel.api, what); }

  template <typename... Arguments>
  Status ask(Place place, Arguments... arguments) const {
    return call(kernel.api, place, arguments...);
  }

  Status described(const void* value, Shaped& found) const {
    void* info = nullptr;
    Status status = ask(kGetTensorTypeAndShape, value, &info);
    if (status) return status;
    status = ask(kGetDimensionsCount, static_cast<const void*>(info), &found.axes);
    if (!status && found.axes > 4) status = fail("diagd: a tensor has more than four axes");
    if (!status) status = ask(kGetDimensions, static_cast<const void*>(info), found.shape + 4 - found.axes, found.axes);
    if (!status) status = ask(kGetTensorMutableData, value, &found.data);
    reinterpret_cast<void (*)(void*)>(const_cast<void*>(kernel.api[kReleaseTensorTypeAndShapeInfo]))(info);
    return status;
  }

  Status read() {
    if (Status status = ask(kKernelContextGetInputCount, static_cast<const void*>(context), &count)) return status;
    if (count > kMostInputs) return fail("diagd: an operator of too many inputs");
    for (size_t number = 0; number < count; ++number) {
      const void* value = nullptr;
      if (Status status = ask(kKernelContextGetInput, static_cast<const void*>(context), number, &value)) return status;
      if (!value) return count = number, nullptr;  // left out
      if (Status status = described(value, inputs[number])) return status;
    }
    return ask(kKernelContextGetGpuComputeStream, static_cast<const void*>(context), &stream);
  }

  template <typename Element>
  Status output(size_t number, const int64_t* shape, size_t axes, Element*& data) const {
    void *value = nullptr, *found = nullptr;
    if (Status status = ask(kKernelContextGetOutput, context, number, shape, axes, &value)) return status;
    if (Status status = ask(kGetTensorMutableData, static_cast<const void*>(value), &found)) return status;
    data = static_cast<Element*>(found);
    return nullptr;
  }

  Status output(size_t number, std::initializer_list<int64_t> shape, half*& data) const {
    return output(number, shape.begin(), shape.size(), data);
  }

  // As an input, with so many columns.
  template <typename Element>
  Status output(size_t number, const Shaped& like, int64_t columns, Element*& data) const {
    int64_t shape[4];
    std::memcpy(shape, like.shape, sizeof shape);
    shape[3] = columns;
    return output(number, shape + 4 - like.axes, like.axes, data);
  }

  // Work in so many parts, on ONNX Runtime's threads, which end the process where something is thrown.
  template <typename Work>
  Status in_parts(int64_t parts, const Work& work) const {
    if (!parts) return nullptr;
    std::atomic<bool> done{true};
    const auto part = [&](int64_t number) noexcept {
      try {
        work(number);
      } catch (const std::bad_alloc&) {
        done = false;
      }
    };
    using Part = decltype(part);
    const auto run = [](void* part, size_t number) { (*static_cast<Part*>(part))(static_cast<int64_t>(number)); };
    const Status status =
        ask(kKernelContextParallelFor, static_cast<const void*>(context), static_cast<void (*)(void*, size_t)>(run),
            static_cast<size_t>(parts), size_t{0}, const_cast<void*>(static_cast<const void*>(&part)));
    return status || done ? status : fail(kNoMemory);
  }

  template <typename Arguments>
  Status launch(diagd::Function function, Arguments& arguments, int64_t across, int64_t down, int64_t deep,
                int64_t threads, int64_t beside = 1, int64_t shared = 0) const {
    const diagd::Operators& given = kernel.op->given;
    const diagd::Launch launch = given.launch ? given.launch : launcher();
    if (!launch) return fail("diagd: libcuda.so.1 has no cuLaunchKernel");
    void* pointers[] = {&arguments};
    const auto size = [](int64_t number) { return static_cast<unsigned>(number); };
    const int code = launch(given.functions[function], size(across), size(down), size(deep), size(threads),
                            size(beside), 1, size(shared), stream, pointers, nullptr);
    return code == 0 ? nullptr : fail("diagd: CUDA refuses a launch");
  }
};

// x, what is added to it, the norm's weight and its shift -> their sum, and that normalised.
Status run_norm(Call& call) {
  const Shaped& x = call.inputs[0];
  const bool centred = call.kernel.op->label[0] == 'L';
  const size_t most = call.kernel.op->most, weight = centred ? most - 2 : most - 1;
  diagd::NormArguments a = {};
  a.x = x.halves(), a.weight = call.inputs[weight].halves(), a.hidden = static_cast<int32_t>(x.columns());
  a.centred = centred, a.epsilon = call.kernel.real;
  if (centred && call.count == most) a.shift = call.inputs[most - 1].halves();
  bool fits = x.columns() % diagd::kVector == 0 && x.columns() <= diagd::kMostHidden;
  for (size_t number = 1; number < call.count; ++number) {
    const bool is_for_all = number >= weight || call.inputs[number].axes == 1;
    fits = fits && call.inputs[number].is(is_for_all ? 1 : x.rows(), x.columns());
    if (number >= weight) continue;
    a.added[number - 1] = call.inputs[number].halves();
    a.steps[number - 1] = is_for_all ? 0 : x.columns();
  }
  if (!fits) return call.fail("diagd: a norm of another width");
  if (Status status = call.output(0, x, x.columns(), a.sum)) return status;
  if (Status status = call.output(1, x, x.columns(), a.out)) return status;
  return call.launch(diagd::kNormRow, a, x.rows(), 1, 1, diagd::divided(a.hidden, 32 * diagd::kVector) * 32);
}

Status launch_attention(const Call& call, diagd::AttendArguments& a, int32_t heads) {
  const diagd::Operators& given = call.kernel.op->given;
  const int32_t rows = a.width * a.shared;
  const diagd::AttendPlan plan = diagd::attend_plan(heads, rows, a.slots, given.size, given.gpu);
  const int64_t between = diagd::rows_between(plan, heads, rows);
  a.splits = plan.splits, a.split_tiles = plan.split_tiles;
  a.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(given.size));
  a.arrived = reinterpret_cast<unsigned*>(given.between);
  a.found = reinterpret_cast<half*>(given.between + 4 * diagd::most_counters(given.gpu.count));
  a.laws = reinterpret_cast<float*>(a.found + between * given.size);
  return call.launch(diagd::kAttend, a, plan.splits, plan.row_blocks, heads, 32 * plan.warps, plan.teams,
                     plan.teams * diagd::team_bytes(given.size));
}

// Positions of rows and of slots, and inputs of diagd.export.transformer.Heads; whether they fit so many slots of K and
// V, and each other.
template <typename Element, typename Arguments>
bool take_heads(const Call& call, int64_t streams, int64_t slots, int64_t groups, int64_t size, Arguments& a) {
  const Shaped &positions = call.inputs[0], &slot_position = call.inputs[1], *next = call.inputs + 2;
  const int64_t across = next->columns(), width = positions.columns();
  if (std::min({streams, groups, size}) < 1 || across % (groups * size) || across / groups / size < 3) return false;
  bool fits = positions.is(streams, width) && slot_position.rows() * slot_position.columns() == slots * streams;
  const auto take = [&](int64_t rows, int64_t columns, const Element*& place) {
    fits = fits && next->is(rows, columns);
    place = static_cast<const Element*>((next++)->data);
  };
  take(streams * width, across, a.fused);
  if (call.kernel.op->has("Bias")) take(1, across, a.bias);
  if (call.kernel.op->has("Norm")) take(1, size, a.query_norm), take(1, size, a.key_norm);
  if (call.kernel.op->has("Rotary"))
    take(streams * width, size / 2, a.cosines), take(streams * width, size / 2, a.sines);
  a.positions = static_cast<const int32_t*>(positions.data);
  a.slot_position = static_cast<const int32_t*>(slot_position.data);
  a.width = static_cast<int32_t>(width), a.groups = static_cast<int32_t>(groups);
  a.shared = static_cast<int32_t>(across / groups / size) - 2, a.epsilon = call.kernel.real;
  return fits;
}

constexpr char kOtherShapes[] = "diagd: an attention of tensors whose shapes do not fit each other";

// What take_heads takes, K, V, a mask that is not made, the first slot -> [streams * width, heads * D], K, V.
Status run_attention(Call& call) {
  const Shaped* past = call.inputs + call.count - 4;
  const int32_t size = call.kernel.op->given.size;
  const int64_t streams = past->shape[0], groups = past->shape[1], slots = past->shape[2];
  diagd::AttendArguments a = {};
  if (past->columns() != size) return call.fail("diagd: an attention of another head size");
  if (!take_heads<half>(call, streams, slots, groups, size, a) || a.width < 1 || slots < 1 || !past[1].is_like(*past) ||
      !past[3].is(1, streams))
    return call.fail(kOtherShapes);
  a.across = a.groups * (a.shared + 2), a.slots = static_cast<int32_t>(slots);
  a.write_index = static_cast<const int64_t*>(past[3].data);
  if (Status status = call.output(0, {streams * a.width, groups * a.shared * size}, a.out)) return status;
  if (Status status = call.output(1, past[0], size, a.keys)) return status;
  if (Status status = call.output(2, past[1], size, a.values)) return status;
  if (a.keys != past[0].data || a.values != past[1].data)
    return call.fail("diagd: K and V are not bound to the same memory as inputs and as outputs");
  return launch_attention(call, a, a.groups * static_cast<int32_t>(streams));
}

// K or V, which ONNX Runtime is mostly given the same memory of as input and as output.
Status buffer(const Call& call, const Shaped& past, size_t output, float*& present) {
  if (Status status = call.output(output, past, past.columns(), present)) return status;
  if (present != past.data) std::memcpy(present, past.data, sizeof(float) * past.rows() * past.columns());
  return nullptr;
}

// What take_heads takes, of rows [B, W] and of slots [T, B], K and V [T, B, G, D], slots of the rows [B, W]
// -> [B * W, H * D], K, V.
Status run_prefix_attention(Call& call) {
  const Shaped* past = call.inputs + call.count - 3;
  const int64_t streams = past->shape[1], groups = past->shape[2], size = past->columns();
  diagd::PrefixArguments a = {};
  a.slots = past->shape[0], a.streams = static_cast<int32_t>(streams), a.size = static_cast<int32_t>(size);
  if (!take_heads<float>(call, streams, a.slots, groups, size, a) || !past[1].is_like(*past) ||
      !past[2].is(streams, a.width))
    return call.fail(kOtherShapes);
  a.written = static_cast<const int64_t*>(past[2].data);
  const int64_t rows = streams * a.width;
  for (int64_t row = 0; row < rows; ++row) {
    if (a.written[row] < 0 || a.written[row] >= a.slots) return call.fail("diagd: a slot that is not bound");
  }
  if (Status status = call.output(0, call.inputs[2], int64_t{a.groups} * a.shared * a.size, a.out)) return status;
  if (Status status = buffer(call, past[0], 1, a.keys)) return status;
  if (Status status = buffer(call, past[1], 2, a.values)) return status;
  if (!rows) return nullptr;
  diagd::PrefixTasks tasks(a, call.kernel.op->given.gpu.count);
  tasks.write();
  const auto run = [&](int64_t task) { tasks.run(task); };
  return call.in_parts(tasks.count(), run);
}

// Each of so many rows, on ONNX Runtime's threads.
template <typename Work>
Status in_rows(const Call& call, int64_t rows, const Work& work) {
  const int64_t parts = std::min<int64_t>(rows, call.kernel.op->given.gpu.count);
  const auto run = [&](int64_t part) {
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) work(row);
  };
  return call.in_parts(parts, run);
}

// Gate and up [rows, 2 * inner] -> [rows, inner].
Status run_gate(Call& call) {
  const Shaped& x = call.inputs[0];
  const int64_t inner = x.columns() / 2;
  float* out = nullptr;
  if (x.columns() % 2) return call.fail("diagd: a gate of an odd width");
  if (Status status = call.output(0, x, inner, out)) return status;
  return in_rows(call, x.rows(), [&](int64_t row) {
    const float* gate = x.floats() + row * 2 * inner;
    diagd::gate(gate, gate + inner, inner, out + row * inner);
  });
}

// x, what is added to it, the norm's weight -> their sum, and that normalised.
Status run_rms_norm(Call& call) {
  const Shaped& x = call.inputs[0];
  const int64_t columns = x.columns();
  float *sum = nullptr, *out = nullptr;
  if (!call.inputs[1].is(x.rows(), columns) || !call.inputs[2].is(1, columns))
    return call.fail("diagd: a norm of another width");
  if (Status status = call.output(0, x, columns, sum)) return status;
  if (Status status = call.output(1, x, columns, out)) return status;
  return in_rows(call, x.rows(), [&](int64_t row) {
    const int64_t at = row * columns;
    diagd::normalise({x.floats() + at, call.inputs[1].floats() + at, call.inputs[2].floats(), sum + at, out + at,
                      columns, call.kernel.real});
  });
}

// Panels first..last of a weight's, on ONNX Runtime's threads; more parts than those, of which one may be late.
template <typename Work>
Status in_panels(const Call& call, const diagd::Weight& weight, const Work& work) {
  const int64_t threads = call.kernel.op->given.gpu.count;
  const int64_t parts = std::min<int64_t>(weight.panels, threads == 1 ? 1 : 4 * threads);
  const auto run = [&](int64_t part) { work(part * weight.panels / parts, (part + 1) * weight.panels / parts); };
  return call.in_parts(parts, run);
}

constexpr char kOtherProduct[] = "diagd: a product of tensors whose shapes do not fit each other";

// x [rows, K], a weight [K, N] -> their product [rows, N].
Status run_product(Call& call) {
  thread_local std::vector<float> memory;
  const Shaped& x = call.inputs[0];
  const diagd::FloatWeight& weight = *call.kernel.floats;
  const int64_t rows = x.rows(), across = weight.across();
  float* out = nullptr;
  if (x.columns() != weight.inputs) return call.fail(kOtherProduct);
  if (Status status = call.output(0, x, weight.outputs, out)) return status;
  if (!rows) return nullptr;
  if (memory.size() < static_cast<size_t>(rows * across)) memory.resize(rows * across);
  float* apart = memory.data();
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(apart + row * across, x.floats() + row * weight.inputs, sizeof(float) * weight.inputs);
  return in_panels(call, weight,
                   [&](int64_t first, int64_t last) { weight.multiply(apart, rows, first, last, out); });
}

// x [rows, K], a weight of eight bits [K, N], scales of its columns; of x where they are fixed, and its zero point, else
// each row has that of its largest magnitude -> their product [rows, N].
Status run_int8_product(Call& call) {
  constexpr float kSmallest = 1e-12f, kLimit = 127.0f;
  thread_local std::vector<uint8_t> rounded_rows;
  thread_local std::vector<float> row_scales;
  const Shaped& x = call.inputs[0];
  const diagd::Int8Weight& weight = *call.kernel.bytes;
  const bool fixed = call.count == 5;
  if (x.columns() != weight.inputs || !call.inputs[2].is(1, weight.outputs) ||
      (fixed && !(call.inputs[3].is(1, 1) && call.inputs[4].is(1, 1))))
    return call.fail(kOtherProduct);
  float* out = nullptr;
  if (Status status = call.output(0, x, weight.outputs, out)) return status;
  const int64_t rows = x.rows(), across = weight.across();
  if (!rows) return nullptr;
  rounded_rows.resize(rows * across), row_scales.resize(rows);
  uint8_t* rounded = rounded_rows.data();
  float* scales = row_scales.data();
  const int32_t zero = fixed ? *static_cast<const uint8_t*>(call.inputs[4].data) : 128;
  const auto round = [&](int64_t row) {
    const float* from = x.floats() + row * weight.inputs;
    scales[row] = fixed ? *call.inputs[3].floats() : diagd::reach(from, weight.inputs, kSmallest) * (1 / kLimit);
    diagd::round_row(from, weight.inputs, scales[row], zero, rounded + row * across);
  };
  if (Status status = in_rows(call, rows, round)) return status;
  return in_panels(call, weight, [&](int64_t first, int64_t last) {
    weight.multiply({rounded, scales, rows}, zero, call.inputs[2].floats(), first, last, out);
  });
}

// Queries [rows, heads * D], their norm's weight, K and V of a text -> as queries.
Status run_text_attention(Call& call) {
  const Shaped &queries = call.inputs[0], &keys = call.inputs[2];
  const int32_t size = call.kernel.op->given.size;
  diagd::AttendArguments a = {};
  a.fused = queries.halves(), a.query_norm = call.inputs[1].halves(), a.epsilon = call.kernel.real;
  a.keys = static_cast<half*>(keys.data), a.values = static_cast<half*>(call.inputs[3].data);
  a.width = static_cast<int32_t>(queries.rows()), a.across = static_cast<int32_t>(queries.columns() / size);
  a.groups = static_cast<int32_t>(keys.shape[1]), a.slots = static_cast<int32_t>(keys.shape[2]);
  if (keys.columns() != size) return call.fail("diagd: an attention of another head size");
  if (std::min({a.width, a.groups, a.slots, a.across}) < 1 || queries.columns() % (keys.shape[1] * size) ||
      !call.inputs[1].is(1, size) || keys.shape[0] != 1 || !call.inputs[3].is_like(keys))
    return call.fail(kOtherShapes);
  a.shared = a.across / a.groups;
  if (Status status = call.output(0, queries, queries.columns(), a.out)) return status;
  return launch_attention(call, a, a.groups);
}

// Gate and up in one, or x and its bias -> the activation.
Status run_activation(Call& call) {
  const Shaped& x = call.inputs[0];
  const bool gated = call.kernel.op->label[0] == 'S';
  diagd::ActivationArguments a = {};
  a.x = x.halves(), a.bias = call.count > 1 ? call.inputs[1].halves() : nullptr;
  a.inner = static_cast<int32_t>(gated ? x.columns() / 2 : x.columns());
  if (a.inner % diagd::kVector || (gated && x.columns() % 2) || (a.bias && !call.inputs[1].is(1, a.inner)))
    return call.fail("diagd: an activation of another width");
  if (Status status = call.output(0, x, a.inner, a.out)) return status;
  const diagd::Function function = gated ? diagd::kSwiGLU : diagd::kGELU;
  return call.launch(function, a, diagd::divided(a.inner, 128 * diagd::kVector), x.rows(), 1, 128);
}

// Attention reads positions itself: what its function has of a mask is not made.
Status run_mask(Call& call) {
  half* none = nullptr;
  return call.output(0, {1}, none);
}

// Ids, positions and tables -> the first layer's input, and rows of the tables that layers read.
Status run_embed(Call& call) {
  const Operator& op = *call.kernel.op;
  const Shaped &ids = call.inputs[0], *next = call.inputs + 2;
  const int64_t hidden = next->columns(), rows = ids.columns();
  size_t results = 1;
  diagd::EmbedArguments a = {};
  a.ids = static_cast<const int32_t*>(ids.data), a.positions = static_cast<const int32_t*>(call.inputs[1].data);
  a.prefix = static_cast<int32_t>(call.kernel.wholes[0]), a.frame_length = static_cast<int32_t>(call.kernel.wholes[1]);
  bool fits = ids.axes == 1 && call.inputs[1].is(1, rows) && a.frame_length > 0;
  const auto take = [&](int64_t columns, const half*& table) {
    fits = fits && next->columns() == columns && columns % diagd::kVector == 0;
    table = next++->halves();
  };
  take(hidden, a.embedding), a.hidden = static_cast<int32_t>(hidden);
  if (op.has("Slot")) fits = fits && next->rows() >= a.frame_length, take(hidden, a.slots);
  if (op.has("Position")) take(hidden, a.places);
  if (op.has("Rotary")) {
    const int64_t pairs = next->columns();
    take(pairs, a.cosines), take(pairs, a.sines), a.pairs = static_cast<int32_t>(pairs);
    if (Status status = call.output(results++, {rows, pairs}, a.cosine_rows)) return status;
    if (Status status = call.output(results++, {rows, pairs}, a.sine_rows)) return status;
  }
  if (op.has("Added")) {
    take(hidden, a.added);
    if (Status status = call.output(results, {rows, hidden}, a.added_rows)) return status;
  }
  if (!fits) return call.fail("diagd: rows of tables of another width");
  if (Status status = call.output(0, {rows, hidden}, a.x)) return status;
  const int32_t widest = a.hidden > a.pairs ? a.hidden : a.pairs;
  return call.launch(diagd::kEmbedRow, a, diagd::divided(widest, 128 * diagd::kVector), rows, 1, 128);
}

Status compute(void* pointer, void* context) try {
  Call call = {*static_cast<Kernel*>(pointer), context};
  const Status status = call.read();
  return status ? status : call.kernel.op->run(call);
} catch (const std::bad_alloc&) {
  return failed(static_cast<Kernel*>(pointer)->api, kNoMemory);
}

// The weight of a product, which is constant.
Status pack(Kernel& kernel, const void* info) {
  const Call call = {kernel, nullptr};
  int is_constant = 0;
  const void* value = nullptr;
  Shaped weight;
  if (Status status = call.ask(kKernelInfoGetConstantInput, info, size_t{1}, &is_constant, &value)) return status;
  if (!is_constant || !value) return call.fail("diagd: a product with a weight that is not constant");
  if (Status status = call.described(value, weight)) return status;
  const int64_t inputs = weight.rows(), outputs = weight.columns();
  if (kernel.op->weight == kInt8) {
    kernel.bytes.reset(new diagd::Int8Weight(static_cast<const int8_t*>(weight.data), inputs, outputs));
  } else {
    kernel.floats.reset(new diagd::FloatWeight(weight.floats(), inputs, outputs));
  }
  return nullptr;
}

Status create(const CustomOp* base, const void* const* api, const void* info, void** made) try {
  const auto* op = static_cast<const Operator*>(base);
  std::unique_ptr<Kernel> kernel(new Kernel{op, api, 0.0f, {}, nullptr, nullptr});
  if (op->real) {
    if (Status status = call(api, kKernelInfoGetAttributeFloat, info, op->real, &kernel->real)) return status;
  }
  for (size_t number = 0; number < 2 && op->wholes[number]; ++number) {
    int64_t* whole = &kernel->wholes[number];
    if (Status status = call(api, kKernelInfoGetAttributeInteger, info, op->wholes[number], whole)) return status;
  }
  if (Status status = op->weight ? pack(*kernel, info) : nullptr) return status;
  *made = kernel.release();
  return nullptr;
} catch (const std::bad_alloc&) {
  return failed(api, kNoMemory);
}

const Operator* of(const CustomOp* op) { return static_cast<const Operator*>(op); }

Operator described(size_t least, size_t most, size_t results, Status (*run)(Call&), const char* label = "") {
  Operator op = {};
  op.version = kApiVersion;
  op.name = [](const CustomOp* op) { return static_cast<const char*>(of(op)->label); };
  op.provider = [](const CustomOp* op) {
    return of(op)->given.provider ? of(op)->given.provider : of(op)->provider_name;
  };
  op.inputs = [](const CustomOp* op) { return of(op)->most; };
  op.outputs = [](const CustomOp* op) { return of(op)->results; };
  op.input_type = [](const CustomOp* op, size_t input) { return of(op)->type(input); };
  op.output_type = [](const CustomOp* op, size_t) { return of(op)->floating; };
  op.input_kind = [](const CustomOp* op, size_t input) { return input < of(op)->least ? kRequired : kOptional; };
  op.output_kind = [](const CustomOp*, size_t) { return kRequired; };
  op.input_memory = [](const CustomOp*, size_t) { return kDeviceMemory; };
  op.create_checked = create;
  op.compute_checked = compute;
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.first_version = [](const CustomOp*) { return 1; };
  op.last_version = [](const CustomOp*) { return 0x7fffffff; };
  op.least = least, op.most = most, op.results = results, op.run = run;
  op.floating = kFloat16, op.provider_name = "CUDAExecutionProvider";
  std::strcpy(op.label, label);
  return op;
}

thread_local diagd::Operators next_given = {};

Status add(const void* const* api, void* domain, Operator op) {
  op.given = next_given;  // and lives as long as the process: a session may outlive its options
  op.given.gpu.count = std::max(op.given.gpu.count, 1);
  return call(api, kCustomOpDomainAdd, domain, static_cast<const CustomOp*>(new Operator(op)));
}

// Names say what is added, and whether it is the bias of what is ahead.
Status add_norms(const void* const* api, void* domain) {
  for (const char* added : {"Add", "AddAdd", "AddBias", "AddBiasAdd"}) {
    size_t inputs = 2;
    for (const char* at = added; *at; ++at) inputs += *at == 'A' || *at == 'B';
    for (const char* norm : {"RMSNorm", "LayerNorm"}) {
      const bool centred = norm[0] == 'L';  // with a shift, or without
      Operator op = described(inputs, inputs + centred, 2, run_norm, norm);
      op.real = "epsilon";
      std::strcat(op.label, added);
      if (Status status = add(api, domain, op)) return status;
    }
  }
  return nullptr;
}

// Names say what there is among the inputs, in this order.
Status add_attentions(const void* const* api, void* domain, const Operator& kind) {
  for (size_t parts = 0; parts < 8; ++parts) {
    const bool bias = parts & 1, norm = parts & 2, rotary = parts & 4;
    Operator op = kind;
    op.least = op.most = kind.most + bias + 2 * norm + 2 * rotary;
    op.real = "epsilon", op.writes = true, op.integers = 2;
    for (const char* part : {bias ? "Bias" : "", norm ? "Norm" : "", rotary ? "Rotary" : ""})
      std::strcat(op.label, part);
    if (Status status = add(api, domain, op)) return status;
  }
  return nullptr;
}

Status add_cached_attentions(const void* const* api, void* domain) {
  return add_attentions(api, domain, described(7, 7, 3, run_attention, "CachedAttention"));
}

Status add_embeddings(const void* const* api, void* domain) {
  for (size_t parts = 0; parts < 16; ++parts) {
    const bool slot = parts & 1, position = parts & 2, rotary = parts & 4, added = parts & 8;
    const size_t inputs = size_t{3} + slot + position + 2 * rotary + added;
    Operator op = described(inputs, inputs, size_t{1} + 2 * rotary + added, run_embed, "Embed");
    op.wholes[0] = "prefix", op.wholes[1] = "frame_length", op.integers = 2;
    for (const char* part :
         {slot ? "Slot" : "", position ? "Position" : "", rotary ? "Rotary" : "", added ? "Added" : ""})
      std::strcat(op.label, part);
    if (Status status = add(api, domain, op)) return status;
  }
  return nullptr;
}

Status add_others(const void* const* api, void* domain) {
  Operator mask = described(2, 2, 1, run_mask, "CachedMask");
  Operator text = described(4, 4, 1, run_text_attention, "TextAttention");
  mask.integers = 2, text.real = "epsilon";
  for (const Operator& op : {mask, text, described(1, 1, 1, run_activation, "SwiGLU"),
                             described(1, 1, 1, run_activation, "GELU"),
                             described(2, 2, 1, run_activation, "BiasGELU")}) {
    if (Status status = add(api, domain, op)) return status;
  }
  return nullptr;
}

Status add_host(const void* const* api, void* domain) {
  Operator attention = described(6, 6, 3, run_prefix_attention, "BoundAttention");
  Operator gate = described(1, 1, 1, run_gate, "BoundSwiGLU");
  Operator norm = described(3, 3, 2, run_rms_norm, "BoundRMSNormAdd");
  Operator product = described(2, 2, 1, run_product, "BoundProduct");
  Operator fixed = described(5, 5, 1, run_int8_product, "Int8Product");
  Operator by_row = described(3, 3, 1, run_int8_product, "Int8ProductByRow");
  norm.real = "epsilon", product.weight = kFloat32, fixed.weight = by_row.weight = kInt8;
  for (Operator* op : {&attention, &gate, &norm, &product, &fixed, &by_row})
    op->floating = kFloat32, op->provider_name = "CPUExecutionProvider";
  if (Status status = add_attentions(api, domain, attention)) return status;
  for (const Operator* op : {&gate, &norm, &product, &fixed, &by_row}) {
    const bool runs = !op->weight || (op->weight == kInt8 ? diagd::has_int8_products() : diagd::has_float_products());
    if (Status status = runs ? add(api, domain, *op) : nullptr) return status;
  }
  return nullptr;
}

}  // namespace

// Which products have a kernel that packs their weights itself.
extern "C" int32_t diagd_packs(int32_t int8) { return int8 ? diagd::has_int8_products() : diagd::has_float_products(); }

// What the next session is given that registers this library on this thread.
extern "C" void diagd_operators_with(const diagd::Operators* given) { next_given = *given; }

extern "C" int32_t diagd_operators_arguments_size() { return sizeof(diagd::Operators); }

// Bytes of a block's memory that a launch takes at most, of those that a block may have.
extern "C" int32_t diagd_attend_shared(int32_t size, int32_t bytes) {
  return diagd::teams_beside(diagd::kLeastWarps, size, bytes) * diagd::team_bytes(size);
}

// Bytes of ``between``, for a device of so many processors.
extern "C" int64_t diagd_attend_bytes(int32_t processors, int32_t size) {
  return diagd::bytes_between(processors, size);
}

// How attention is divided: warps of a team, teams of a block, blocks of rows, splits, tiles of one.
extern "C" void diagd_attend_plan(int32_t heads, int32_t rows, int32_t slots, int32_t size, int32_t processors,
                                  int32_t bytes, int32_t* plan) {
  const diagd::AttendPlan found = diagd::attend_plan(heads, rows, slots, size, {processors, bytes});
  std::memcpy(plan, &found, sizeof found);
}

// Called by ONNX Runtime.
extern "C" Status RegisterCustomOps(void* options, const ApiBase* base) {
  const void* const* api = base->get(kApiVersion);
  if (!api) return nullptr;
  void* domain = nullptr;
  if (Status status = call(api, kCreateCustomOpDomain, "diagd", &domain)) return status;
  const bool has_functions = next_given.functions[0];
  for (auto add_some : {add_host, add_norms, add_cached_attentions, add_embeddings, add_others}) {
    if (Status status = has_functions || add_some == add_host ? add_some(api, domain) : nullptr) return status;
  }
  next_given = {};
  return call(api, kAddCustomOpDomain, options, domain);
}
