// Runs the threads of a GPU as fibers of one CPU thread.
//
// A fiber runs until it waits: at a barrier, in a shuffle, or at its end. Then another thread of the block is chosen,
// after one of three schedules. What a GPU leaves undefined or would hang on ends the process with a report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace dtf {

struct Geometry;  // csrc/cuda/gpu_compat.cuh

namespace simt {

// ---- what kernels call ------------------------------------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

void barrier(int line);
// The value that the lane whose number differs in the bits of `mask` brings to its own call.
uint64_t exchange(uint64_t value, int mask);
// Shared memory of this block: the same for all threads that name the same identity. Exactly so many bytes, all 0xFF
// (a NaN) at first.
void* shared_array(const void* identity, size_t bytes);
void* dynamic_shared_array();

// ---- launches ---------------------------------------------------------------------------------------------------

struct Launch {
  const void* kernel;
  const Geometry& geometry;
  std::vector<std::string> parameters;  // the bytes of each
};
using Thread = std::function<void()>;  // all of what one thread does

// What becomes of a launch is the program's affair (driver.cpp).
void launch(const Launch& launch, const Thread& thread);

// lockstep: each thread in turn, up to where it waits.
// random: any thread that does not wait.
// greedy: one warp as far as its next barrier before the others; barriers that are missing show best here.
enum class Schedule { lockstep, random, greedy };

// Runs all blocks of a launch, in random order.
void execute(const Launch& launch, const Thread& thread, Schedule schedule, uint64_t seed);

// The mangled name of a kernel, as in the code that nvcc makes of it.
std::string symbol(const void* kernel);

[[noreturn]] void fail(const std::string& message);

}  // namespace simt
}  // namespace dtf
