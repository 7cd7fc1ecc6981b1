// The emulator as a program: reads requests from standard input, answers on standard output (emulator.py writes and
// reads them). An error ends it with a report on standard error, whether it comes from here, from a sanitizer or from
// a signal.
//
//   run|plan OPERATOR DTYPE COUNT MAX_BLOCKS SCHEDULE SEED LINES
//   buffer NAME BYTES MISALIGNMENT      LINES of these; the contents of the buffers follow the last
//   value NAME VALUE                    a number, or an address for a pointer
//
// The answer to `run` is "end" and the buffers' contents after it; to `plan`, which runs nothing, a line for each
// launch and "end".
#include "driver.h"

#include <unistd.h>

#include <iostream>
#include <memory>
#include <sstream>

namespace dtf::simt {

std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> table;
  return table;
}

namespace {

const std::map<std::string, Schedule> schedules = {
    {"lockstep", Schedule::lockstep}, {"random", Schedule::random}, {"greedy", Schedule::greedy}};

// Of the present request.
bool plan;
Schedule schedule;
uint64_t seed;

// Global memory of exactly so many bytes, so that AddressSanitizer sees what lies beyond them.
struct Buffer {
  Buffer(size_t bytes, size_t misalignment)
      : bytes(bytes), memory(std::make_unique<char[]>(misalignment + bytes)), data(memory.get() + misalignment) {}
  size_t bytes;
  std::unique_ptr<char[]> memory;
  char* data;
};

void print(const Launch& launch) {
  const Geometry& g = launch.geometry;
  std::cout << symbol(launch.kernel) << ' ' << g.grid_x << ' ' << g.grid_y << ' ' << g.block << ' ' << g.shared_bytes;
  for (const std::string& parameter : launch.parameters) {
    std::cout << ' ';
    for (unsigned char byte : parameter) std::cout << "0123456789abcdef"[byte / 16] << "0123456789abcdef"[byte % 16];
  }
  std::cout << '\n';
}

void serve(const std::string& line) {
  std::istringstream words(line);
  std::string mode, name, dtype, order, next;
  int lines;
  Request request;
  words >> mode >> name >> dtype >> request.count >> request.queue.max_blocks >> order >> seed >> lines;
  plan = mode == "plan";
  schedule = schedules.at(order);

  std::vector<Buffer> buffers;
  while (lines-- > 0 && std::getline(std::cin, next)) {
    std::istringstream description(next);
    std::string kind, field, value;
    size_t misalignment = 0;
    description >> kind >> field >> value >> misalignment;
    if (kind == "buffer") {
      buffers.emplace_back(std::stoull(value), misalignment);
      value = std::to_string(reinterpret_cast<uintptr_t>(buffers.back().data));
    }
    request.fields[field] = value;
  }
  for (Buffer& buffer : buffers) std::cin.read(buffer.data, static_cast<std::streamsize>(buffer.bytes));

  const auto found = operators().find(name + " " + dtype);
  if (found == operators().end()) fail("no operator " + name + " for " + dtype + " in this build");
  found->second(request);

  std::cout << "end\n";
  for (Buffer& buffer : buffers) std::cout.write(buffer.data, static_cast<std::streamsize>(buffer.bytes));
  std::cout.flush();
}

}  // namespace

void launch(const Launch& launch, const Thread& thread) {
  if (plan)
    print(launch);
  else
    execute(launch, thread, schedule, seed);
}

}  // namespace dtf::simt

int main() {
  std::ios::sync_with_stdio(false);
  constexpr unsigned seconds = 60;  // for one request; the signal ends the program
  for (std::string line; std::getline(std::cin, line);) {
    alarm(seconds);
    dtf::simt::serve(line);
    alarm(0);  // between requests it may wait for as long as the tests do something else
  }
}
