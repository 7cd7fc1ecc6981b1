// The table of operators that the emulator knows, by name and dtype.
#pragma once

#include <cstdlib>
#include <map>
#include <string>
#include <type_traits>

#include "cuda/launch.cuh"

namespace dtf::simt {

// What an operator is to run on: the fields of its arguments as text, pointers as addresses.
struct Request {
  std::map<std::string, std::string> fields;
  int64_t count;
  Queue queue;
};

using Operator = void (*)(const Request&);
std::map<std::string, Operator>& operators();  // "name dtype" -> what queues its launches

template <typename T>
constexpr const char* dtype_name = "float32";
template <>
inline constexpr const char* dtype_name<double> = "float64";
template <>
inline constexpr const char* dtype_name<Half> = "float16";
template <>
inline constexpr const char* dtype_name<BFloat16> = "bfloat16";

template <typename Field>
void parse(const std::string& text, Field& field) {
  if constexpr (std::is_floating_point_v<Field>)
    field = std::strtod(text.c_str(), nullptr);
  else if constexpr (std::is_pointer_v<Field>)
    field = reinterpret_cast<Field>(std::strtoull(text.c_str(), nullptr, 10));
  else
    field = static_cast<Field>(std::strtoll(text.c_str(), nullptr, 10));
}

// fields[i], the i-th of "a, b, c", becomes the i-th of the references.
template <typename... Fields>
void fill(const Request& request, std::string names, Fields&... fields) {
  if (request.fields.size() != sizeof...(Fields)) fail("the fields are " + names);
  auto next = [&, begin = size_t{0}](auto& field) mutable {
    const size_t end = std::min(names.find(", ", begin), names.size());
    const auto value = request.fields.find(names.substr(begin, end - begin));
    if (value == request.fields.end()) fail("the fields are " + names);
    parse(value->second, field);
    begin = end + 2;
  };
  (next(fields), ...);
}

// One line per operator: its struct of arguments and the names of the fields, in order. Which storage types are
// compiled in is builds.py's choice.
#define DTF_OPERATOR(Kernel, ...)                                                                             \
  template <typename T>                                                                                       \
  void queue_##Kernel(const Request& request) {                                                               \
    Kernel<T> arguments{};                                                                                    \
    auto& [__VA_ARGS__] = arguments;                                                                          \
    fill(request, #__VA_ARGS__, __VA_ARGS__);                                                                 \
    if (request.count > 0) enqueue(arguments, request.count, request.queue);                                  \
  }                                                                                                           \
  template <typename... T>                                                                                    \
  bool add_##Kernel() {                                                                                       \
    return (operators().emplace(#Kernel " " + std::string(dtype_name<T>), &queue_##Kernel<T>).second && ...); \
  }                                                                                                           \
  static const bool has_##Kernel = add_##Kernel<DTF_TYPES>()

}  // namespace dtf::simt
