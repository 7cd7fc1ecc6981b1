// Entropy of the clean rows and their KL divergence to the adversarial rows, forward and backward.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> entropy_kl(Tensor clean, Tensor adv) {
  check_logits("clean", clean);
  check_same("adv", adv, clean);
  clean = as_contiguous(clean), adv = as_contiguous(adv);
  const int64_t rows = clean.size(0), classes = clean.size(1);
  Tensor entropy = new_rows(clean, {rows}), kl = new_rows(clean, {rows}), normalisers = new_rows(clean, {rows, 4});
  visit_dtype("clean", clean, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(
        clean, EntropyKLForward<T>{in<T>(clean), in<T>(adv), out<A>(entropy), out<A>(kl), out<A>(normalisers), classes},
        rows, classes, Split::at_vectors);
  });
  return {entropy, kl, normalisers};
}

template <typename Device>
std::tuple<Tensor, Tensor> entropy_kl_backward(std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_kl,
                                               Tensor clean, Tensor adv, Tensor entropy, Tensor kl,
                                               Tensor normalisers) {
  check_logits("clean", clean);
  check_same("adv", adv, clean);
  const ScalarType row = row_dtype(clean);
  clean = as_contiguous(clean), adv = as_contiguous(adv);
  auto rows_of = [&](const char* name, const Tensor& x) {
    check_rows(name, x, clean, row);
    return as_contiguous(x);
  };
  entropy = rows_of("entropy", entropy), kl = rows_of("kl", kl), normalisers = rows_of("normalisers", normalisers);
  STD_TORCH_CHECK(normalisers.dim() == 2 && normalisers.size(1) == 4, "normalisers must have shape [N, 4]");
  if (grad_entropy) grad_entropy = rows_of("grad_entropy", *grad_entropy);
  if (grad_kl) grad_kl = rows_of("grad_kl", *grad_kl);
  Tensor grad_clean = new_like(clean), grad_adv = new_like(adv);
  const int64_t rows = clean.size(0), classes = clean.size(1);
  visit_dtype("clean", clean, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(clean,
                   EntropyKLBackward<T>{grad_entropy ? in<A>(*grad_entropy) : nullptr,
                                        grad_kl ? in<A>(*grad_kl) : nullptr, in<T>(clean), in<T>(adv), in<A>(entropy),
                                        in<A>(kl), in<A>(normalisers), out<T>(grad_clean), out<T>(grad_adv), classes},
                   rows, classes, Split::at_vectors);
  });
  return {grad_clean, grad_adv};
}

}  // namespace dtf
