// ONNX's Attention on a GPU for ONNX Runtime's CUDA provider, by diagd_attend in place of the provider's own.
//
// A custom operator of ONNX's domain stands before the provider's. Declared here is what is used of ONNX Runtime's C
// interface, whose structures only grow at their ends (include/onnxruntime/core/session/onnxruntime_c_api.h).
#if !defined(_WIN32)

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "attention.h"

namespace {

constexpr uint32_t kApiVersion = 17;  // ONNX Runtime 1.17: the first with all that is used
constexpr int kFloat16 = 10, kRequired = 0, kDeviceMemory = 0;

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
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelContextGetGpuComputeStream = 193,
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

// What sessions are given, from Python: functions of a loaded module, memory for what splits find.
struct Attention {
  void* attend;
  void* combine;
  float* partial;
  int64_t partial_floats;
  int32_t processors;
  int32_t size;
};

struct AttentionOp : CustomOp {
  Attention given;
};

struct Kernel {
  const AttentionOp* op;
  const void* const* api;
  float scale;
};

using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                       void* stream, void**, void**);

Launch launcher() {
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  static const auto launch = driver ? reinterpret_cast<Launch>(dlsym(driver, "cuLaunchKernel")) : nullptr;
  return launch;
}

struct Shaped {
  void* data = nullptr;
  int64_t shape[4] = {1, 1, 1, 1};  // aligned at the end
  Status status = nullptr;
};

Shaped described(const void* const* api, const void* value) {
  Shaped found;
  void* info = nullptr;
  size_t count = 0;
  int64_t shape[4];
  if ((found.status = call(api, kGetTensorTypeAndShape, value, &info))) return found;
  if (!(found.status = call(api, kGetDimensionsCount, info, &count))) {
    if (count > 4) found.status = failed(api, "diagd: a tensor of an attention has more than four axes");
    else if (!(found.status = call(api, kGetDimensions, info, shape + 0, count))) {
      for (size_t axis = 0; axis < count; ++axis) found.shape[4 - count + axis] = shape[axis];
      found.status = call(api, kGetTensorMutableData, value, &found.data);
    }
  }
  reinterpret_cast<void (*)(void*)>(const_cast<void*>(api[kReleaseTensorTypeAndShapeInfo]))(info);
  return found;
}

Status launch(const Kernel& kernel, const Shaped (&inputs)[4], void* out, void* stream) {
  const Attention& given = kernel.op->given;
  const auto& queries = inputs[0].shape;
  const int32_t heads = static_cast<int32_t>(queries[0] * queries[1]), rows = static_cast<int32_t>(queries[2]);
  const int32_t slots = static_cast<int32_t>(inputs[1].shape[2]);
  if (queries[3] != given.size || inputs[1].shape[1] != queries[1])
    return failed(kernel.api, "diagd: an attention of another head size, or of more query heads than KV heads");
  const diagd::AttendPlan plan = diagd::attend_plan(heads, rows, slots, given.processors);
  if (diagd::needed_floats(plan, heads, rows, given.size) > given.partial_floats)
    return failed(kernel.api, "diagd: an attention needs more memory than it was given");
  diagd::AttendArguments arguments = {
      inputs[0].data, inputs[1].data, inputs[2].data, inputs[3].data, out, given.partial,
      inputs[3].shape[0] > 1 ? int64_t{rows} * slots : 0, rows, slots, static_cast<int32_t>(queries[1]),
      plan.splits, plan.split_tiles, kernel.scale * 1.4426950408889634f};
  void* pointers[] = {&arguments};
  if (!launcher()) return failed(kernel.api, "diagd: libcuda.so.1 has no cuLaunchKernel");
  int code = launcher()(given.attend, plan.splits, plan.row_blocks, heads, 32 * plan.warps, 1, 1,
                        diagd::attend_shared(given.size), stream, pointers, nullptr);
  if (code == 0 && plan.splits > 1)
    code = launcher()(given.combine, rows, heads, 1, given.size / 2, diagd::kBeside, 1, 0, stream, pointers, nullptr);
  return code == 0 ? nullptr : failed(kernel.api, "diagd: CUDA refuses the launch of an attention");
}

Status compute(void* pointer, void* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  Shaped inputs[4];
  for (size_t number = 0; number < 4; ++number) {
    const void* value = nullptr;
    if (Status status = call(kernel.api, kKernelContextGetInput, context, number, &value)) return status;
    inputs[number] = described(kernel.api, value);
    if (inputs[number].status) return inputs[number].status;
  }
  void *out = nullptr, *data = nullptr, *stream = nullptr;
  const int64_t* shape = inputs[0].shape;
  if (Status status = call(kernel.api, kKernelContextGetOutput, context, size_t{0}, shape, size_t{4}, &out))
    return status;
  if (Status status = call(kernel.api, kGetTensorMutableData, out, &data)) return status;
  if (Status status = call(kernel.api, kKernelContextGetGpuComputeStream, static_cast<const void*>(context), &stream))
    return status;
  return launch(kernel, inputs, data, stream);
}

Status create(const CustomOp* op, const void* const* api, const void* info, void** kernel) {
  float scale = 0.0f;
  if (Status status = call(api, kKernelInfoGetAttributeFloat, info, "scale", &scale)) return status;
  *kernel = new (std::nothrow) Kernel{static_cast<const AttentionOp*>(op), api, scale};
  return *kernel ? nullptr : failed(api, "diagd: no memory");
}

Attention next_given = {};

}  // namespace

// What the next session that registers this library is given.
extern "C" void diagd_attend_with(void* attend, void* combine, float* partial, int64_t partial_floats,
                                  int32_t processors, int32_t size) {
  next_given = {attend, combine, partial, partial_floats, processors, size};
}

// Bytes of a block's memory that a launch takes.
extern "C" int32_t diagd_attend_shared(int32_t size) { return diagd::attend_shared(size); }

// Floats of ``partial``, for a device of so many processors.
extern "C" int64_t diagd_attend_floats(int32_t processors, int32_t size) {
  return diagd::attend_floats(processors, size);
}

// Floats of it that one launch takes.
extern "C" int64_t diagd_attend_needs(int32_t heads, int32_t rows, int32_t slots, int32_t processors, int32_t size) {
  return diagd::needed_floats(diagd::attend_plan(heads, rows, slots, processors), heads, rows, size);
}

// Called by ONNX Runtime. The operator lives as long as the process: a session may outlive its options.
extern "C" Status RegisterCustomOps(void* options, const ApiBase* base) {
  const void* const* api = base->get(kApiVersion);
  if (!api) return nullptr;
  auto* op = new AttentionOp{};
  op->version = kApiVersion;
  op->name = [](const CustomOp*) { return "Attention"; };
  op->provider = [](const CustomOp*) { return "CUDAExecutionProvider"; };
  op->inputs = [](const CustomOp*) { return size_t{4}; };
  op->outputs = [](const CustomOp*) { return size_t{1}; };
  op->input_type = op->output_type = [](const CustomOp*, size_t) { return kFloat16; };
  op->input_kind = op->output_kind = [](const CustomOp*, size_t) { return kRequired; };
  op->input_memory = [](const CustomOp*, size_t) { return kDeviceMemory; };
  op->create_checked = create;
  op->compute_checked = compute;
  op->destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op->first_version = [](const CustomOp*) { return 1; };
  op->last_version = [](const CustomOp*) { return 0x7fffffff; };
  op->given = next_given;
  void* domain = nullptr;
  if (Status status = call(api, kCreateCustomOpDomain, "", &domain)) return status;
  if (Status status = call(api, kCustomOpDomainAdd, domain, static_cast<const CustomOp*>(op))) return status;
  return call(api, kAddCustomOpDomain, options, domain);
}

#endif
