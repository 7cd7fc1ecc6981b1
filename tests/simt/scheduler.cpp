#include "scheduler.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>

#include "cuda/gpu_compat.cuh"

// This file is compiled without sanitizers, which should see what the kernels do and nothing else. Where they are
// linked in, they are told through these functions which fiber runs, what happens before what, and which memory is off
// limits.
extern "C" {
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* address, size_t size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

namespace dtf::simt {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

// Not the constants of csrc/cuda, which are to be checked.
constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr int64_t kMaxSharedBytes = 48 * 1024, kMaxGridX = INT32_MAX, kMaxGridY = 65535;

// ---- fibers -----------------------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 64 * 1024;

#if defined(__x86_64__) && !defined(DTF_PORTABLE_FIBERS)

using Context = void*;  // the stack pointer; what the calling convention preserves lies on the stack

extern "C" void dtf_simt_switch(Context* from, Context* to);
asm(R"(
.text
dtf_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
void prepare(Context* context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;  // a call leaves the stack 8 bytes off a multiple of 16
  *top = reinterpret_cast<void*>(entry);
  *context = top - 6;
}
void switch_context(Context* from, Context* to) { dtf_simt_switch(from, to); }

#else

using Context = ucontext_t;
void prepare(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  makecontext(context, entry, 0);
}
void switch_context(Context* from, Context* to) { swapcontext(from, to); }

#endif

// One of the two sides of a switch. ThreadSanitizer must not take a switch for synchronisation.
struct Fiber {
  Context context;
  void* sanitizer = nullptr;
};
void switch_fiber(Fiber& from, Fiber& to) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.sanitizer, 1);
  switch_context(&from.context, &to.context);
}

void thread_main();

// Fibers are costly to make under ThreadSanitizer, so each runs one thread after the other.
struct Worker : Fiber {
  Worker(unsigned number) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    const size_t colour = number % 16 * 64;  // equal addresses modulo 4096 would compete for the same cache lines
    prepare(&context, static_cast<char*>(memory), kStackBytes - colour, &thread_main);
    if (__tsan_create_fiber) sanitizer = __tsan_create_fiber(0);
  }
  enum { ready, shuffling, waiting, done } state = done;
  int line = 0;        // of the barrier that it waits at
  uint64_t value = 0;  // what it brings to a shuffle, then what it gets there
  int mask = 0;
};

// ---- a block ----------------------------------------------------------------------------------------------------

// Shared memory of one block: arrays in the order of their first use, with gaps that nothing may touch.
class SharedMemory {
 public:
  void clear() {
    used_ = 0, requested_ = 0, count_ = 0;
    if (__asan_poison_memory_region) __asan_poison_memory_region(memory_.get(), kCapacity);
  }
  void* array(const void* identity, size_t bytes) {
    for (int i = 0; i < count_; ++i)
      if (arrays_[i].identity == identity) return arrays_[i].memory;
    requested_ += bytes;
    if (requested_ > kMaxSharedBytes) fail("more than 48 KiB of shared memory");
    if (count_ == kMaxArrays) fail("too many shared arrays");
    char* memory = memory_.get() + used_;
    used_ += (bytes + kGap + 15) / 16 * 16;
    // volatile: a memset would be seen by ThreadSanitizer as this thread's writes
    for (volatile char* c = memory; c < memory_.get() + used_; ++c) *c = '\xFF';
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, bytes);
    arrays_[count_++] = {identity, memory};
    return memory;
  }

 private:
  static constexpr int kMaxArrays = 64, kGap = 64;
  static constexpr size_t kCapacity = kMaxSharedBytes + kMaxArrays * (kGap + 16);
  struct Array {
    const void* identity;
    void* memory;
  };
  std::unique_ptr<char[]> memory_ = std::make_unique<char[]>(kCapacity);
  std::array<Array, kMaxArrays> arrays_;
  int count_ = 0;
  size_t used_ = 0;
  int64_t requested_ = 0;
};

struct Warp {
  uint32_t ready, shuffling;  // a bit per lane
};

void acquire(void* order) {
  if (__tsan_acquire) __tsan_acquire(order);
}
void release(void* order) {
  if (__tsan_release) __tsan_release(order);
}

// What blocks run on, one after the other. Two of them, never synchronised with one another during a launch, show
// ThreadSanitizer races between blocks.
struct Multiprocessor {
  std::deque<Worker> workers;
  SharedMemory shared;
  // What every thread did before `phase` began, happened before what any thread does in it. Of two neighbouring phases
  // each has its own address: the first threads of a phase may end it before others have begun it.
  unsigned phase = 0;
  char order[2];

  void enter_phase() { acquire(&order[phase % 2]); }
  void leave_phase() { release(&order[(phase + 1) % 2]); }
};

struct State {
  Fiber host;
  Multiprocessor multiprocessors[2], *current = nullptr;
  std::vector<Warp> warps;
  int threads = 0, thread = 0;
  const Launch* launch = nullptr;
  const Thread* body = nullptr;
  Schedule schedule = Schedule::lockstep;
  std::mt19937_64 random;

  Worker& worker(int number) { return current->workers[number]; }
} state;

Worker& self() { return state.worker(state.thread); }

// From a thread back to the scheduler.
void wait() { switch_fiber(self(), state.host); }

void thread_main() {
  for (;;) {
    state.current->enter_phase();
    (*state.body)();
    state.current->leave_phase();
    self().state = Worker::done;
    wait();
  }
}

std::string describe(int thread) {
  static const char* const doing[] = {"is ready", "is in a shuffle", "waits at a barrier", "has returned"};
  const Worker& worker = state.worker(thread);
  std::string text = "thread " + std::to_string(thread) + " " + doing[worker.state];
  return worker.state == Worker::waiting ? text + " (line " + std::to_string(worker.line) + ")" : text;
}

// The first thread from `from` on, and round, that does not wait; -1 if there is none.
int first_ready(int from) {
  const int warps = static_cast<int>(state.warps.size());
  int warp = from / kWarp;
  uint32_t lanes = state.warps[warp].ready & (~0u << from % kWarp);
  for (int i = 0; i <= warps; ++i) {
    if (lanes) return warp * kWarp + std::countr_zero(lanes);
    warp = (warp + 1) % warps;
    lanes = state.warps[warp].ready;
  }
  return -1;
}
int next_thread() {
  if (state.schedule == Schedule::lockstep) return first_ready((state.thread + 1) % state.threads);
  const int warp = state.thread / kWarp;
  if (state.schedule == Schedule::greedy && state.warps[warp].ready) return first_ready(warp * kWarp);
  return first_ready(static_cast<int>(state.random() % state.threads));
}

// A warp whose lanes have all stopped, some of them in a shuffle.
void shuffle(int first) {
  for (int lane = first; lane < first + kWarp; ++lane) {
    if (lane >= state.threads) fail("a shuffle in a warp that is not full");
    if (state.worker(lane).state != Worker::shuffling) fail("not all lanes take part in a shuffle: " + describe(lane));
    if (state.worker(lane).mask != state.worker(first).mask) fail("the lanes of a shuffle use different masks");
  }
  if (state.worker(first).mask < 0 || state.worker(first).mask >= kWarp) fail("a shuffle beyond the warp");
  uint64_t values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) values[lane] = state.worker(first + lane).value;
  for (int lane = 0; lane < kWarp; ++lane) {
    Worker& worker = state.worker(first + lane);
    worker.value = values[lane ^ worker.mask];
    worker.state = Worker::ready;
  }
  state.warps[first / kWarp] = {~0u, 0};
}

void set_all_ready() {
  for (int thread = 0; thread < state.threads; ++thread) {
    state.worker(thread).state = Worker::ready;
    state.warps[thread / kWarp].ready |= 1u << thread % kWarp;
  }
}

// No thread can go on: they all wait at the same barrier, or all are done, or they will never meet. Whether the block
// goes on.
bool next_phase() {
  const Worker& first = state.worker(0);
  for (int thread = 1; thread < state.threads; ++thread) {
    const Worker& other = state.worker(thread);
    if (other.state != first.state || (first.state == Worker::waiting && other.line != first.line))
      fail("divergent barrier: " + describe(0) + ", " + describe(thread));
  }
  ++state.current->phase;
  return first.state == Worker::waiting;
}

void run(int thread) {
  state.thread = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  Worker& worker = state.worker(thread);
  switch_fiber(state.host, worker);

  const uint32_t bit = 1u << thread % kWarp;
  Warp& warp = state.warps[thread / kWarp];
  warp.ready &= ~bit;
  if (worker.state == Worker::shuffling) warp.shuffling |= bit;
  if (!warp.ready && warp.shuffling) shuffle(thread / kWarp * kWarp);
}

void run_block(unsigned x, unsigned y) {
  blockIdx = {x, y, 0};
  state.current->shared.clear();
  state.warps.assign((state.threads + kWarp - 1) / kWarp, {0, 0});
  state.thread = state.threads - 1;
  do {
    set_all_ready();
    for (int thread; (thread = next_thread()) >= 0;) run(thread);
  } while (next_phase());
}

}  // namespace

void barrier(int line) {
  Worker& worker = self();
  worker.state = Worker::waiting;
  worker.line = line;
  state.current->leave_phase();
  wait();
  state.current->enter_phase();
}

uint64_t exchange(uint64_t value, int mask) {
  Worker& worker = self();
  worker.state = Worker::shuffling;
  worker.value = value;
  worker.mask = mask;
  wait();
  return worker.value;
}

void* shared_array(const void* identity, size_t bytes) { return state.current->shared.array(identity, bytes); }
void* dynamic_shared_array() { return shared_array(state.launch, state.launch->geometry.shared_bytes); }

void execute(const Launch& launch, const Thread& body, Schedule schedule, uint64_t seed) {
  const Geometry& g = launch.geometry;
  if (g.block < 1 || g.block > kMaxThreads) fail("a block of " + std::to_string(g.block) + " threads");
  if (g.grid_x < 1 || g.grid_x > kMaxGridX || g.grid_y < 1 || g.grid_y > kMaxGridY) fail("the grid is out of bounds");
  state.launch = &launch, state.body = &body, state.threads = g.block;
  state.schedule = schedule, state.random.seed(seed);
  gridDim = {static_cast<unsigned>(g.grid_x), static_cast<unsigned>(g.grid_y), 1};
  blockDim = {static_cast<unsigned>(g.block), 1, 1};

  if (__tsan_get_current_fiber) state.host.sanitizer = __tsan_get_current_fiber();
  for (Multiprocessor& m : state.multiprocessors) {
    while (m.workers.size() < static_cast<size_t>(g.block)) m.workers.emplace_back(m.workers.size());
    release(&m.order[m.phase % 2]);  // what the host did happens before the launch
  }

  std::vector<int64_t> blocks(g.grid_x * g.grid_y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), state.random);
  for (size_t i = 0; i < blocks.size(); ++i) {
    state.current = &state.multiprocessors[i % 2];
    run_block(static_cast<unsigned>(blocks[i] % g.grid_x), static_cast<unsigned>(blocks[i] / g.grid_x));
  }
  for (Multiprocessor& m : state.multiprocessors) m.enter_phase();  // and the launch before what it does next
  state.current = nullptr;
}

std::string symbol(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) fail("a kernel without a name");
  return info.dli_sname;
}

void fail(const std::string& message) {
  if (state.current) {
    const std::string name = symbol(state.launch->kernel);
    int status;
    char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::fprintf(stderr, "%s, block (%u, %u), thread %d: ", readable ? readable : name.c_str(), blockIdx.x, blockIdx.y,
                 state.thread);
  }
  std::fprintf(stderr, "%s\n", message.c_str());
  std::fflush(stderr);
  _exit(1);
}

}  // namespace dtf::simt
