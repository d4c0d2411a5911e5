// A CUDA driver that runs the kernels on the processor, to rehearse `tests/on_gpu run` where there is no GPU: what of
// NVIDIA's interface airstream uses, done at once and in order. It shows that calls and steps fit together, and nothing
// about a GPU.
#include "../../kernels/host/shim.cpp"

#include <cstdlib>
#include <map>
#include <mutex>

namespace {
constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, ALREADY_REGISTERED = 712, LAUNCH_FAILED = 719;
constexpr size_t MEMORY_BYTES = size_t(2) << 30;

std::recursive_mutex work;
std::map<u64, size_t> allocated;
std::map<void *, size_t> registered;
size_t taken;
int failed = SUCCESS;

// Whether a range is memory that was allocated or registered.
bool is_known(u64 start, size_t bytes) {
    auto within = [&](u64 other, size_t length) { return start >= other && start + bytes <= other + length; };
    for (auto [other, length] : allocated)
        if (within(other, length)) return true;
    for (auto [other, length] : registered)
        if (within(u64(other), length)) return true;
    return false;
}
} // namespace

#define CALL(name, ...)                                                                                               \
    extern "C" int name(__VA_ARGS__) {                                                                                \
        std::lock_guard<std::recursive_mutex> lock(work);
#define END                                                                                                           \
    return failed;                                                                                                    \
    }

CALL(cuInit, unsigned) END
CALL(cuDriverGetVersion, int *version) *version = 12040; END
CALL(cuDeviceGet, int *device, int) *device = 0; END
CALL(cuDeviceGetName, char *name, int bytes, int) snprintf(name, bytes, "a processor in a GPU's clothes"); END
CALL(cuDeviceGetAttribute, int *value, int attribute, int)
    switch (attribute) {
    case 16: *value = 2; break;                                       // multiprocessors
    case 18: *value = getenv("REHEARSED_INTEGRATED") != nullptr; break; // integrated
    case 75: *value = 8; break;                                       // capability
    case 76: *value = 0; break;
    case 99: *value = 1; break; // memory can be registered
    default: return INVALID_VALUE;
    }
END
CALL(cuDevicePrimaryCtxRetain, void **context, int) *context = &work; END
CALL(cuDevicePrimaryCtxRelease_v2, int) END
CALL(cuCtxSetCurrent, void *context) if (context != &work) return INVALID_VALUE; END
CALL(cuCtxGetDevice, int *device) *device = 0; END
CALL(cuCtxSynchronize) END
CALL(cuStreamCreate, void **stream, unsigned) *stream = new int; END
CALL(cuStreamSynchronize, void *) END
CALL(cuStreamDestroy_v2, void *stream) delete static_cast<int *>(stream); END
CALL(cuEventCreate, void **event, unsigned) *event = new int; END
CALL(cuEventDestroy_v2, void *event) delete static_cast<int *>(event); END
CALL(cuEventRecord, void *, void *) END
CALL(cuEventQuery, void *) END
CALL(cuModuleLoadData, void **module, const char *image) *module = const_cast<char *>(image); END
CALL(cuModuleLoadDataEx, void **module, const char *image, unsigned, int *, void **)
    *module = const_cast<char *>(image);
END
CALL(cuModuleUnload, void *) END
CALL(cuModuleGetFunction, void **function, void *module, const char *name)
    if (strstr(static_cast<char *>(module), name) == nullptr) return NOT_FOUND;
    *function = strdup(name);
END
CALL(cuFuncSetAttribute, void *, int, int) END
CALL(cuMemGetInfo_v2, size_t *free, size_t *all) *free = MEMORY_BYTES - taken, *all = MEMORY_BYTES; END
CALL(cuMemAlloc_v2, u64 *address, size_t bytes)
    if (bytes == 0) return INVALID_VALUE;
    if (taken + bytes > MEMORY_BYTES) return OUT_OF_MEMORY;
    *address = u64(aligned_alloc(512, (bytes + 511) / 512 * 512));
    allocated[*address] = bytes, taken += bytes;
END
CALL(cuMemFree_v2, u64 address)
    auto found = allocated.find(address);
    if (found == allocated.end()) return INVALID_VALUE;
    taken -= found->second;
    allocated.erase(found);
    free(reinterpret_cast<void *>(address));
END
CALL(cuMemHostRegister_v2, void *memory, size_t bytes, unsigned)
    // Whole pages, and each once.
    if (u64(memory) % 4096 != 0 || bytes % 4096 != 0) return INVALID_VALUE;
    for (auto [other, length] : registered)
        if (u64(memory) < u64(other) + length && u64(other) < u64(memory) + bytes) return ALREADY_REGISTERED;
    registered[memory] = bytes;
END
CALL(cuMemHostGetDevicePointer_v2, u64 *address, void *memory, unsigned) *address = u64(memory); END
CALL(cuMemHostUnregister, void *memory) if (registered.erase(memory) != 1) return INVALID_VALUE; END
CALL(cuMemcpyAsync, u64 to, u64 from, size_t bytes, void *)
    if (!is_known(to, bytes) || !is_known(from, bytes)) return INVALID_VALUE;
    memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
END
static void launch(const char *name, const u32 (&grid)[3], u32 threads, void **arguments) {
    // The tests' own kernel is in PTX alone.
    if (failed != SUCCESS || strcmp(name, "tensor_rate") == 0) return;
    const char *failure = shim_launch(name, grid, threads, arguments, 0);
    if (failure != nullptr) fprintf(stderr, "%s: %s\n", name, failure), failed = LAUNCH_FAILED;
}
CALL(cuLaunchKernel, void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
     unsigned, void *, void **arguments, void **)
    launch(static_cast<char *>(function), {x, y, z}, threads, arguments);
END

// Graphs are chains of launches here, and what is made of one is itself. A launch's first argument begins the 128 bytes
// that hold all of them (`Args`), of which a node has a copy; pointers to those that there are not are null.
namespace {
struct Params {
    char *function;
    u32 grid[3], threads, others[3];
    void **arguments, **extra;
};
struct Node {
    char *function;
    u32 grid[3], threads;
    alignas(16) char bytes[128];
    void *arguments[8];

    void set(const Params &params) {
        function = params.function, threads = params.threads;
        memcpy(grid, params.grid, sizeof(grid));
        const char *first = static_cast<char *>(params.arguments[0]);
        memcpy(bytes, first, sizeof(bytes));
        for (int i = 0; i < 8; i++) {
            char *argument = static_cast<char *>(params.arguments[i]);
            arguments[i] = argument ? bytes + (argument - first) : nullptr;
        }
    }
};
using Graph = std::vector<std::unique_ptr<Node>>;
} // namespace
CALL(cuGraphCreate, Graph **graph, unsigned) *graph = new Graph; END
CALL(cuGraphAddKernelNode, Node **node, Graph *graph, Node *const *before, size_t count, const Params *params)
    // Each is behind the one before.
    if (count != !graph->empty() || (count == 1 && *before != graph->back().get())) return INVALID_VALUE;
    graph->push_back(std::make_unique<Node>());
    *node = graph->back().get();
    (*node)->set(*params);
END
CALL(cuGraphInstantiateWithFlags, Graph **ready, Graph *graph, u64) *ready = graph; END
CALL(cuGraphExecKernelNodeSetParams, Graph *, Node *node, const Params *params)
    if (node->function != params->function) return INVALID_VALUE;
    node->set(*params);
END
CALL(cuGraphLaunch, Graph *graph, void *)
    for (auto &node : *graph) launch(node->function, node->grid, node->threads, node->arguments);
END
CALL(cuGraphExecDestroy, Graph *) END
CALL(cuGraphDestroy, Graph *graph) delete graph; END
extern "C" int cuGetErrorString(int, const char **text) {
    *text = "it says no more here";
    return SUCCESS;
}
