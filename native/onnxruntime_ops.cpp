// What stands between a step's products, for ONNX Runtime: one launch where its CUDA provider has many, and attention
// of the prefix form, on the host.
//
// Functions of our graphs (diagd/export/tracing.py) have these names; a provider that has an operator of the name
// runs that, others put the function's nodes in its place. A name stays what it was: older graphs had "Heads..",
// "Attend" and "Mask" with other inputs, which none may have again. Declared here is what is used of ONNX Runtime's C
// interface, whose structures only grow at their ends (include/onnxruntime/core/session/onnxruntime_c_api.h).
#if !defined(_WIN32)

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>

#include "attention.h"
#include "layer.h"
#include "prefix_attention.h"

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
constexpr int kFloat32 = 1, kFloat16 = 10, kInt32 = 6, kInt64 = 7, kRequired = 0, kOptional = 1, kDeviceMemory = 0;
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

// An operator: its inputs are `floating`, but for the first `integers` and, where it has a place to write, the last.
struct Operator : CustomOp {
  char label[32];
  size_t least, most;  // inputs
  size_t results;
  size_t integers;
  bool writes;
  int floating;
  const char* provider_name;
  const char* real;  // attributes, null where it has none
  const char* wholes[2];
  Status (*run)(Call&);
  diagd::Operators given;

  bool has(const char* part) const { return std::strstr(label, part) != nullptr; }
  int type(size_t input) const {
    if (writes && input + 1 == most) return kInt64;
    return input < integers ? kInt32 : floating;
  }
};

struct Kernel {
  const Operator* op;
  const void* const* api;
  float real;
  int64_t wholes[2];
};

diagd::Launch launcher() {
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  static const auto launch = driver ? reinterpret_cast<diagd::Launch>(dlsym(driver, "cuLaunchKernel")) : nullptr;
  return launch;
}

struct Shaped {
  void* data = nullptr;
  size_t axes = 0;
  int64_t shape[4] = {1, 1, 1, 1};  // aligned at the end

  const half* halves() const { return static_cast<const half*>(data); }
  float* floats() const { return static_cast<float*>(data); }
  int64_t columns() const { return shape[3]; }
  int64_t rows() const { return shape[0] * shape[1] * shape[2]; }
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

  // Work in so many parts, on ONNX Runtime's threads.
  template <typename Work>
  Status in_parts(int64_t parts, const Work& work) const {
    if (!parts) return nullptr;
    const auto run = [](void* work, size_t part) { (*static_cast<const Work*>(work))(static_cast<int64_t>(part)); };
    return ask(kKernelContextParallelFor, static_cast<const void*>(context), static_cast<void (*)(void*, size_t)>(run),
               static_cast<size_t>(parts), size_t{0}, const_cast<void*>(static_cast<const void*>(&work)));
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
  for (size_t number = 1; number < weight; ++number) {
    a.added[number - 1] = call.inputs[number].halves();
    a.steps[number - 1] = call.inputs[number].axes == 1 ? 0 : x.columns();
  }
  if (a.hidden % diagd::kVector || a.hidden > diagd::kMostHidden) return call.fail("diagd: a norm of another width");
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

// Positions of rows and of slots, inputs of diagd.export.transformer.Heads, K, V, a mask that is not made, the first
// slot -> [streams * width, heads * D], K, V.
Status run_attention(Call& call) {
  const Operator& op = *call.kernel.op;
  const Shaped *next = call.inputs + 2, *past = call.inputs + call.count - 4;
  const int32_t size = op.given.size, heads = static_cast<int32_t>(past->shape[0] * past->shape[1]);
  diagd::AttendArguments a = {};
  const int64_t rows = next->rows();
  a.across = static_cast<int32_t>(next->columns() / size), a.fused = next++->halves();
  if (op.has("Bias")) a.bias = next++->halves();
  if (op.has("Norm")) a.query_norm = next++->halves(), a.key_norm = next++->halves();
  if (op.has("Rotary")) a.cosines = next++->halves(), a.sines = next++->halves();
  a.positions = static_cast<const int32_t*>(call.inputs[0].data);
  a.slot_position = static_cast<const int32_t*>(call.inputs[1].data);
  a.write_index = static_cast<const int64_t*>(past[3].data);
  a.width = static_cast<int32_t>(rows / past->shape[0]), a.groups = static_cast<int32_t>(past->shape[1]);
  a.shared = a.across / a.groups - 2, a.slots = static_cast<int32_t>(past->shape[2]);
  a.epsilon = call.kernel.real;
  if (past->columns() != size) return call.fail("diagd: an attention of another head size");
  if (Status status = call.output(0, {rows, int64_t{a.groups} * a.shared * size}, a.out)) return status;
  if (Status status = call.output(1, past[0], size, a.keys)) return status;
  if (Status status = call.output(2, past[1], size, a.values)) return status;
  if (a.keys != past[0].data || a.values != past[1].data)
    return call.fail("diagd: K and V are not bound to the same memory as inputs and as outputs");
  return launch_attention(call, a, heads);
}

// K or V, which ONNX Runtime is mostly given the same memory of as input and as output.
Status buffer(const Call& call, const Shaped& past, size_t output, float*& present) {
  if (Status status = call.output(output, past, past.columns(), present)) return status;
  if (present != past.data) std::memcpy(present, past.data, sizeof(float) * past.rows() * past.columns());
  return nullptr;
}

// Positions of rows [B, W] and of slots [T, B], inputs of diagd.export.transformer.Heads, K and V [T, B, G, D], slots
// of the rows [B, W] -> [B * W, H * D], K, V.
Status run_prefix_attention(Call& call) {
  const Operator& op = *call.kernel.op;
  const Shaped *next = call.inputs + 2, *past = call.inputs + call.count - 3;
  diagd::PrefixArguments a = {};
  const int64_t rows = next->rows(), across = next->columns();
  a.fused = next++->floats();
  if (op.has("Bias")) a.bias = next++->floats();
  if (op.has("Norm")) a.query_norm = next++->floats(), a.key_norm = next++->floats();
  if (op.has("Rotary")) a.cosines = next++->floats(), a.sines = next++->floats();
  a.positions = static_cast<const int32_t*>(call.inputs[0].data);
  a.slot_position = static_cast<const int32_t*>(call.inputs[1].data);
  a.written = static_cast<const int64_t*>(past[2].data);
  a.slots = past->shape[0], a.width = static_cast<int32_t>(call.inputs[0].columns());
  a.streams = static_cast<int32_t>(past->shape[1]), a.groups = static_cast<int32_t>(past->shape[2]);
  a.size = static_cast<int32_t>(past->columns()), a.shared = static_cast<int32_t>(across / a.size) / a.groups - 2;
  a.epsilon = call.kernel.real;
  for (int64_t row = 0; row < rows; ++row) {
    if (a.written[row] < 0 || a.written[row] >= a.slots) return call.fail("diagd: a slot that is not bound");
  }
  if (Status status = call.output(0, call.inputs[2], int64_t{a.groups} * a.shared * a.size, a.out)) return status;
  if (Status status = buffer(call, past[0], 1, a.keys)) return status;
  if (Status status = buffer(call, past[1], 2, a.values)) return status;
  if (!rows) return nullptr;
  diagd::PrefixTasks tasks(a, op.given.gpu.count);
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
  if (Status status = call.output(0, x, columns, sum)) return status;
  if (Status status = call.output(1, x, columns, out)) return status;
  return in_rows(call, x.rows(), [&](int64_t row) {
    const int64_t at = row * columns;
    diagd::normalise({x.floats() + at, call.inputs[1].floats() + at, call.inputs[2].floats(), sum + at, out + at,
                      columns, call.kernel.real});
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
  a.shared = a.across / a.groups;
  if (keys.columns() != size) return call.fail("diagd: an attention of another head size");
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
  if (a.inner % diagd::kVector) return call.fail("diagd: an activation of another width");
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
  const Shaped &ids = call.inputs[0], *next = call.inputs + 3;
  const int64_t hidden = call.inputs[2].columns();
  size_t results = 1;
  diagd::EmbedArguments a = {};
  a.ids = static_cast<const int32_t*>(ids.data), a.positions = static_cast<const int32_t*>(call.inputs[1].data);
  a.embedding = call.inputs[2].halves(), a.hidden = static_cast<int32_t>(hidden);
  a.prefix = static_cast<int32_t>(call.kernel.wholes[0]), a.frame_length = static_cast<int32_t>(call.kernel.wholes[1]);
  if (Status status = call.output(0, {ids.columns(), hidden}, a.x)) return status;
  if (op.has("Slot")) a.slots = next++->halves();
  if (op.has("Position")) a.places = next++->halves();
  if (op.has("Rotary")) {
    a.pairs = static_cast<int32_t>(next->columns()), a.cosines = next++->halves(), a.sines = next++->halves();
    if (Status status = call.output(results++, {ids.columns(), a.pairs}, a.cosine_rows)) return status;
    if (Status status = call.output(results++, {ids.columns(), a.pairs}, a.sine_rows)) return status;
  }
  if (op.has("Added")) {
    a.added = next->halves();
    if (Status status = call.output(results, {ids.columns(), hidden}, a.added_rows)) return status;
  }
  if (hidden % diagd::kVector || a.pairs % diagd::kVector || ids.axes != 1)
    return call.fail("diagd: rows of tables of another width");
  const int32_t widest = a.hidden > a.pairs ? a.hidden : a.pairs;
  return call.launch(diagd::kEmbedRow, a, diagd::divided(widest, 128 * diagd::kVector), ids.columns(), 1, 128);
}

Status compute(void* pointer, void* context) {
  Call call = {*static_cast<Kernel*>(pointer), context};
  const Status status = call.read();
  return status ? status : call.kernel.op->run(call);
}

Status create(const CustomOp* base, const void* const* api, const void* info, void** made) {
  const auto* op = static_cast<const Operator*>(base);
  Kernel kernel = {op, api, 0.0f, {}};
  if (op->real) {
    if (Status status = call(api, kKernelInfoGetAttributeFloat, info, op->real, &kernel.real)) return status;
  }
  for (size_t number = 0; number < 2 && op->wholes[number]; ++number) {
    int64_t* whole = &kernel.wholes[number];
    if (Status status = call(api, kKernelInfoGetAttributeInteger, info, op->wholes[number], whole)) return status;
  }
  *made = new (std::nothrow) Kernel(kernel);
  return *made ? nullptr : failed(api, "diagd: no memory");
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
  norm.real = "epsilon";
  for (Operator* op : {&attention, &gate, &norm})
    op->floating = kFloat32, op->provider_name = "CPUExecutionProvider";
  if (Status status = add_attentions(api, domain, attention)) return status;
  if (Status status = add(api, domain, gate)) return status;
  return add(api, domain, norm);
}

}  // namespace

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

#endif
