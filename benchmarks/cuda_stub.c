/* Libraries that stand in for CUDA's: device memory is host memory, copies are made, kernels are counted and not run.

   Each call that a step could be slowed by is a line in the file that DIAGD_STUB_LOG names. This file is
   compiled twice, for libcudart and, with PRODUCTS, for cuBLAS; what else the provider links against answers 0,
   and benchmarks/partition.py takes those names from its symbol table. */

#include <stdlib.h>

void diagd_note(const char *what, const char *name);

static void *handle(void) { return calloc(1, 64); }

#ifndef PRODUCTS

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

static FILE *log_file;
static int capturing;

void diagd_note(const char *what, const char *name) {
    if (!log_file) {
        const char *path = getenv("DIAGD_STUB_LOG");
        log_file = fopen(path ? path : "/dev/null", "a");
        setvbuf(log_file, NULL, _IOLBF, 0);
    }
    fprintf(log_file, "%s%s:%s\n", capturing ? "captured " : "", what, name);
}

static void *memory(size_t size) {
    void *block = NULL;
    if (posix_memalign(&block, 512, size ? size : 1)) return NULL;
    return memset(block, 0, size);
}

/* Kernels: the address of the host's stand-in for each, and its name. */

static struct { const void *host; const char *name; } kernels[1 << 17];
static int known;

static const char *name_of(const void *host) {
    for (int n = known - 1; n >= 0; n--)
        if (kernels[n].host == host) return kernels[n].name;
    return "unknown";
}

static cudaError_t launched(const void *host) {
    diagd_note("kernel", name_of(host));
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { (void)binary; return handle(); }
void __cudaRegisterFatBinaryEnd(void **binary) { (void)binary; }
void __cudaUnregisterFatBinary(void **binary) { (void)binary; }
void __cudaRegisterVar(void **a, char *b, char *c, const char *d, int e, size_t f, int g, int h) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
}
void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name, int limit, void *a,
                            void *b, void *c, void *d, int *size) {
    (void)binary, (void)device, (void)limit, (void)a, (void)b, (void)c, (void)d, (void)size;
    if (known < (int)(sizeof kernels / sizeof *kernels)) {
        kernels[known].host = host;
        kernels[known++].name = strdup(name);
    }
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configured;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configured.grid = grid, configured.block = block, configured.shared = shared, configured.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configured.grid, *block = configured.block, *shared = configured.shared;
    *(void **)stream = configured.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void **kernel, const void *host) { *kernel = (void *)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void *kernel, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    (void)g, (void)b, (void)a, (void)s, (void)t;
    return launched(kernel);
}
cudaError_t cudaLaunchKernel(const void *host, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    (void)g, (void)b, (void)a, (void)s, (void)t;
    return launched(host);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *host, void **a) {
    (void)c, (void)a;
    return launched(host);
}
cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    (void)g, (void)b, (void)a, (void)s, (void)t;
    return launched(host);
}

/* One device: an H100. */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    (void)device;
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stub");
    p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32;
    p->totalGlobalMem = 80ull << 30, p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10, p->regsPerBlock = p->regsPerMultiprocessor = 1 << 16;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    for (int n = 0; n < 3; n++) p->maxThreadsDim[n] = n < 2 ? 1024 : 64, p->maxGridSize[n] = n ? 65535 : 2147483647;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    (void)device;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *host) {
    (void)host;
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 227 << 10;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *h, int b, size_t s,
                                                                   unsigned f) {
    (void)h, (void)b, (void)s, (void)f;
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    (void)name, (void)version, (void)flags;
    *entry = NULL;
    if (found) *found = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t error) { (void)error; return "stub"; }
const char *cudaGetErrorString(cudaError_t error) { (void)error; return "stub"; }

/* Memory. */

cudaError_t cudaMalloc(void **address, size_t size) { diagd_note("allocation", ""); *address = memory(size); return cudaSuccess; }
cudaError_t cudaMallocHost(void **address, size_t size) { *address = memory(size); return cudaSuccess; }
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) { (void)flags; *address = memory(size); return cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void **address, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
    (void)pool, (void)stream;
    *address = memory(size);
    return cudaSuccess;
}
cudaError_t cudaFree(void *address) { free(address); return cudaSuccess; }
cudaError_t cudaFreeHost(void *address) { free(address); return cudaSuccess; }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { (void)stream; free(address); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *left = 70ull << 30, *total = 80ull << 30; return cudaSuccess; }
static const char *const directions[] = {"host to host", "host to device", "device to host", "device to device", "default"};
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    diagd_note("waiting copy", directions[kind]);
    memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    diagd_note("copy", directions[kind]);
    memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    diagd_note("copy", directions[kind]);
    for (size_t n = 0; n < height; n++) memmove((char *)to + n * to_pitch, (const char *)from + n * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { diagd_note("clear", ""); memset(to, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    (void)stream;
    diagd_note("clear", "");
    memset(to, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, enum cudaMemcpyKind kind) {
    (void)symbol, (void)offset, (void)kind;
    memset(to, 0, size);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice, a->devicePointer = a->hostPointer = (void *)address;
    return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *p) { (void)p; *pool = handle(); return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr a, void *value) {
    (void)pool, (void)a;
    *(unsigned long long *)value = 0;
    return cudaSuccess;
}

/* Streams, events, graphs. */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { (void)flags; *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { (void)stream; diagd_note("wait", ""); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { diagd_note("wait", ""); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { (void)flags; *event = handle(); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { (void)a, (void)b; *ms = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    (void)stream;
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)stream, (void)mode;
    capturing = 1;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    (void)stream;
    capturing = 0, *graph = handle();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    (void)graph, (void)flags;
    *exec = handle();
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) { (void)exec, (void)stream; diagd_note("graph", ""); return cudaSuccess; }
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *a, enum cudaJitOption *b, void **c, unsigned d,
                                enum cudaLibraryOption *e, void **f, unsigned g) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g;
    *library = handle();
    return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    (void)library, (void)name;
    *kernel = handle();
    return cudaSuccess;
}

#else

#include <string.h>

int cublasCreate_v2(void **made) { *made = handle(); return 0; }
int cublasLtCreate(void **made) { *made = handle(); return 0; }
int cublasLtMatmulDescCreate(void **made) { *made = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **made) { *made = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = handle(); return 0; }
int cublasLtMatrixTransformDescCreate(void **made) { *made = handle(); return 0; }
int cublasGetMathMode(void *handle_, int *mode) { (void)handle_; *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { (void)status; return "stub"; }
const char *cublasGetStatusString(int status) { (void)status; return "stub"; }
int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int wanted,
                                   void *results, int *count) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)wanted;
    memset(results, 0, 96); /* one result, without workspace */
    *count = 1;
    return 0;
}
#define PRODUCT(name) int name() { diagd_note("product", #name); return 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgeam)
PRODUCT(cublasDgeam)
PRODUCT(cublasLtMatmul)
PRODUCT(cublasLtMatrixTransform)

int cuLaunchKernel() { diagd_note("kernel", "of a library"); return 0; }

#endif
