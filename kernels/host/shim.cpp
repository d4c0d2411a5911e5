// Runs the kernels on the host, one block after the other; a block's threads are fibers.
#include "../all.cu"

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER 1
#endif
#endif
#ifdef ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __asan_unpoison_memory_region(const void *, size_t) {}
static void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
static void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
#endif

// Leaves the stack at hand, with what a call must keep, for another that was left so: a place of a stack pointer to
// write, and a stack pointer. (swapcontext() asks the system for the signal mask each time, which takes longer than the
// kernels.)
extern "C" void shim_switch(void **from, void *to);
#if defined(__x86_64__)
asm(R"(
.text
.globl shim_switch
.hidden shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, . - shim_switch
)");
// Words that it keeps on a stack, and which of them is where it goes on.
constexpr int KEPT = 8, GOES_ON = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl shim_switch
.hidden shim_switch
.type shim_switch, %function
shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size shim_switch, . - shim_switch
)");
constexpr int KEPT = 20, GOES_ON = 11;
#else
#error "the kernels' tests run on x86-64 and aarch64"
#endif

namespace shim {
Place place;

namespace {
constexpr size_t STACK_BYTES = 128 << 10;
constexpr u32 THREADS_MAX = 1024, WARPS_MAX = THREADS_MAX / 32, BARRIERS = 16;

enum class State { Ready, Waiting, Done };

struct Copy {
    Sixteen *to;
    const Sixteen *from;
};

struct Fiber {
    // Where its stack was left.
    void *left = nullptr;
    std::unique_ptr<char[]> stack;
    State state = State::Done;
    // The barrier of some threads that it waits at, if it does.
    u32 barrier = 0;
    // Copies begun and not done yet, and where their groups end.
    std::vector<Copy> copies;
    std::vector<size_t> groups;
    void *fake_stack = nullptr;
};

// Threads that wait for each other: those that have arrived, and what each showed, in this round and the last one.
struct Meeting {
    u32 arrived = 0;
    u32 round = 0;
    Words shown[2][32];
};

void *caller_left;
void *caller_fake_stack;
const void *caller_stack;
size_t caller_stack_bytes;
std::vector<Fiber> fibers;
Meeting block_meeting, warp_meetings[WARPS_MAX];
// Threads that have arrived at each barrier of some threads.
u32 arrived[BARRIERS];
void (*body)(void *const *);
void *const *body_params;
u64 order;
std::string failure;

u32 random_below(u32 n) {
    order = order * 6364136223846793005ull + 1442695040888963407ull;
    return u32(order >> 33) % n;
}

// The next fiber that can go on, from a place that `order` chooses; `place.threads` if there is none.
u32 next_ready() {
    u32 n = place.threads;
    u32 first = order == 0 ? place.thread + 1 : order == 1 ? place.thread + n - 1 : random_below(n);
    for (u32 i = 0; i < n; i++) {
        u32 candidate = (order == 1 ? first + n - i : first + i) % n;
        if (fibers[candidate].state == State::Ready) return candidate;
    }
    return n;
}

// Leaves this fiber for another one, or for the caller where none can go on.
void leave(bool for_good) {
    u32 from = place.thread, to = next_ready();
    Fiber &me = fibers[from];
    if (to == from) return;
    bool to_caller = to == place.threads;
    if (to_caller && !for_good)
        failure = "threads wait for each other: a barrier or an exchange is not reached by all of them";
    void **keep = for_good || to_caller ? nullptr : &me.fake_stack;
    if (to_caller) {
        __sanitizer_start_switch_fiber(keep, caller_stack, caller_stack_bytes);
        shim_switch(&me.left, caller_left);
    } else {
        place.thread = to;
        __sanitizer_start_switch_fiber(keep, fibers[to].stack.get(), STACK_BYTES);
        shim_switch(&me.left, fibers[to].left);
    }
    __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
}

void wait_at(Meeting &meeting, u32 first, u32 count) {
    if (++meeting.arrived == count) {
        meeting.arrived = 0;
        meeting.round++;
        for (u32 i = first; i < first + count; i++) fibers[i].state = State::Ready;
    } else {
        u32 round = meeting.round;
        fibers[place.thread].state = State::Waiting;
        while (meeting.round == round) leave(false);
    }
}

// Arrives at a barrier of `count` threads; whether all have.
bool arrive(u32 id, u32 count) {
    if (++arrived[id] < count) return false;
    arrived[id] = 0;
    for (Fiber &fiber : fibers) {
        if (fiber.barrier != id) continue;
        fiber.barrier = 0;
        fiber.state = State::Ready;
    }
    return true;
}

void run_fiber() {
    const void *from = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
    if (caller_stack == nullptr) {
        caller_stack = from;
        caller_stack_bytes = bytes;
    }
    body(body_params);
    Fiber &me = fibers[place.thread];
    if (!me.copies.empty()) failure = "a thread ends with copies under way";
    me.state = State::Done;
    leave(true);
}

void prepare(Fiber &fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(STACK_BYTES);
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.barrier = 0;
    // What the last thread on this stack had in its frames is gone.
    __asan_unpoison_memory_region(fiber.stack.get(), STACK_BYTES);
    // As if it had been left where `run_fiber` begins; stacks are aligned to 16 bytes there.
    void **top = reinterpret_cast<void **>(reinterpret_cast<size_t>(fiber.stack.get() + STACK_BYTES) / 16 * 16);
    void **left = top - KEPT;
    for (int i = 0; i < KEPT; i++) left[i] = nullptr;
    left[GOES_ON] = reinterpret_cast<void *>(run_fiber);
    fiber.left = left;
    fiber.state = State::Ready;
}

void run_block() {
    block_meeting = Meeting{};
    for (u32 &count : arrived) count = 0;
    for (u32 i = 0; i < place.threads; i++) {
        warp_meetings[i / 32] = Meeting{};
        prepare(fibers[i]);
    }
    place.thread = 0;
    place.thread = next_ready();
    caller_stack = nullptr;
    __sanitizer_start_switch_fiber(&caller_fake_stack, fibers[place.thread].stack.get(), STACK_BYTES);
    shim_switch(&caller_left, fibers[place.thread].left);
    __sanitizer_finish_switch_fiber(caller_fake_stack, nullptr, nullptr);
    for (u32 i = 0; i < place.threads && failure.empty(); i++)
        if (fibers[i].state != State::Done) failure = "a thread has not ended";
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void *const *params, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A> *>(params[I])...);
}
// Calls a kernel with the arguments that `params` point to, as the driver's API does.
template <auto kernel> struct Caller;
template <class... A, void (*kernel)(A...)> struct Caller<kernel> {
    static void run(void *const *params) { call(kernel, params, std::index_sequence_for<A...>{}); }
};

struct Entry {
    const char *name;
    void (*run)(void *const *);
};
#define ENTRY(kernel) {#kernel, Caller<kernel>::run},
#define QUANTIZED(W, name) ENTRY(matvec_##name) ENTRY(matmul_##name) ENTRY(matpanel_##name) ENTRY(embed_##name)
#define FLOAT(W, name) ENTRY(floats_##name) ENTRY(embed_##name)
const Entry ENTRIES[] = {
    QUANTIZED_TYPES(QUANTIZED) FLOAT_TYPES(FLOAT) ENTRY(norm_quantize) ENTRY(silu_quantize) ENTRY(gelu_tanh_quantize)
        ENTRY(place_heads) ENTRY(attend) ENTRY(join_quantize) ENTRY(scale) ENTRY(softcap)
            ENTRY(read_memory) ENTRY(leaders) ENTRY(top_k)};
} // namespace

void block_sync() { wait_at(block_meeting, 0, place.threads); }
void warp_sync() { wait_at(warp_meetings[place.thread / 32], place.thread / 32 * 32, 32); }

void pass_to(u32 id, u32 count) { arrive(id, count); }
void wait_for(u32 id, u32 count) {
    if (arrive(id, count)) return;
    Fiber &me = fibers[place.thread];
    me.barrier = id;
    me.state = State::Waiting;
    while (me.barrier == id) leave(false);
}

const Words *exchange(const Words &mine) {
    Meeting &meeting = warp_meetings[place.thread / 32];
    // A lane that goes ahead shows its next words in the other half while slow lanes still read these.
    Words *shown = meeting.shown[meeting.round % 2];
    shown[place.thread % 32] = mine;
    warp_sync();
    return shown;
}

// Copies are done as late as they may be, so that what reads too early reads what was there before.
void copy_async(Sixteen *to, const Sixteen *from) { fibers[place.thread].copies.push_back({to, from}); }
void copies_end() { fibers[place.thread].groups.push_back(fibers[place.thread].copies.size()); }
void copies_done(u32 pending) {
    Fiber &me = fibers[place.thread];
    if (me.groups.size() <= pending) return;
    size_t groups = me.groups.size() - pending, count = me.groups[groups - 1];
    for (size_t i = 0; i < count; i++) *me.copies[i].to = *me.copies[i].from;
    me.copies.erase(me.copies.begin(), me.copies.begin() + count);
    me.groups.erase(me.groups.begin(), me.groups.begin() + groups);
    for (size_t &end : me.groups) end -= count;
}

// What is below normal, infinities and what is no number.
float from_rare_half(u32 bits) {
    u32 exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    float value = exponent == 0 ? std::ldexp(float(fraction), -24) : fraction == 0 ? INFINITY : NAN;
    return bits >> 15 & 1 ? -value : value;
}

u16 to_rare_half(float a) {
    u16 sign = std::signbit(a) ? 0x8000 : 0;
    float size = std::fabs(a);
    if (std::isnan(a)) return sign | 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    // Units of the last place: 2^-24 for what is subnormal.
    int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    u32 units = u32(std::nearbyintf(std::ldexp(size, -unit)));
    // A carry out of the fraction goes into the exponent by itself.
    return sign | u16(size == 0.0f ? 0 : units + (u32(unit + 24) << 10));
}
} // namespace shim

// Runs a kernel: null, or what went wrong. `order` chooses in which order threads and blocks run: 0 forwards, 1
// backwards, others at random. Not for several threads at a time.
extern "C" __attribute__((visibility("default"))) const char *
shim_launch(const char *name, const u32 *grid, u32 threads, void *const *params, u64 order) {
    shim::failure.clear();
    shim::body = nullptr;
    for (const auto &entry : shim::ENTRIES)
        if (std::string(entry.name) == name) shim::body = entry.run;
    if (shim::body == nullptr) return "there is no kernel of this name";
    if (threads == 0 || threads % 32 != 0 || threads > shim::THREADS_MAX) return "blocks are whole warps";
    if (shim::fibers.empty()) shim::fibers = std::vector<shim::Fiber>(shim::THREADS_MAX);
    shim::body_params = params;
    shim::order = order;
    shim::place.threads = threads;
    u64 blocks = u64(grid[0]) * grid[1] * grid[2];
    for (u64 i = 0; i < blocks && shim::failure.empty(); i++) {
        u64 block = order == 0 ? i : blocks - 1 - i;
        shim::place.block[0] = u32(block % grid[0]);
        shim::place.block[1] = u32(block / grid[0] % grid[1]);
        shim::place.block[2] = u32(block / grid[0] / grid[1]);
        shim::run_block();
    }
    return shim::failure.empty() ? nullptr : shim::failure.c_str();
}
