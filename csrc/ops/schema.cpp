// Every operator on one screen. N samples, C classes; "row" is float32, float64 for float64 inputs.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dtrades_fast, m) {
  // H = -sum p log p, KL = sum p (log p - log p'), both [N]; and [N, 4] row maxima and log-sums for the backward
  m.def("entropy_kl(Tensor clean, Tensor adv) -> (Tensor entropy, Tensor kl, Tensor normalisers)");
  // dKL/dz' = p' - p, dKL/dz = p (log p - log p' - KL), dH/dz = -p (log p + H)
  m.def(
      "entropy_kl_backward(Tensor? grad_entropy, Tensor? grad_kl, Tensor clean, Tensor adv, Tensor entropy, Tensor kl, "
      "Tensor normalisers) -> (Tensor grad_clean, Tensor grad_adv)");
  // softmax(z') - exp(log p), softmax(z) - onehot(y): [N, C]
  m.def("logit_grad_kl(Tensor adv, Tensor clean_log_probs) -> Tensor");
  m.def("logit_grad_ce(Tensor logits, Tensor labels) -> Tensor");
  // losses [N], their figures [N], their gradients; margin = max_{k != y} p_k - p_y, of the adversarial row
  // CE = -log p_y
  m.def("ce_loss(Tensor logits, Tensor labels) -> (Tensor loss, Tensor margin, Tensor grad)");
  // CE(z, y) + w KL, w = clip(base + alpha H + beta s, minimum, maximum)
  m.def(
      "trades_loss(Tensor clean, Tensor adv, Tensor? sensitivity, Tensor labels, float base, float alpha, float beta, "
      "float minimum, float maximum, bool entropy_gradient) -> (Tensor loss, Tensor ce, Tensor kl, Tensor entropy, "
      "Tensor weight, Tensor margin, Tensor grad_clean, Tensor grad_adv, Tensor grad_sensitivity)");
  // BCE + beta w KL, BCE = -log p'_y - log(1 - p'_k + slack), w = 1 - p_y + weight_slack, k the most probable class of
  // p' other than y
  m.def(
      "mart_loss(Tensor clean, Tensor adv, Tensor labels, float beta, float slack, float weight_slack) -> (Tensor "
      "loss, Tensor bce, Tensor kl, Tensor weight, Tensor margin, Tensor grad_clean, Tensor grad_adv)");
  // ||g||_2, ||g||_1, ||g||_inf, sum_i max(g_i (hi_i - x'_i), g_i (lo_i - x'_i)): [N] each
  m.def(
      "sample_stats(Tensor grad, Tensor adv, Tensor clean, float epsilon, float lower, float upper) -> "
      "(Tensor l2, Tensor l1, Tensor linf, Tensor fosc)");
  // clip(base + alpha H(softmax z) + beta ||g||_2, minimum, maximum), H, ||g||_2: [N] each
  m.def(
      "lambda_x(Tensor clean_logits, Tensor grad, float alpha, float beta, float base, float minimum, float maximum) "
      "-> (Tensor value, Tensor entropy, Tensor sensitivity)");
  // x' <- project(x' + step sign(g)) or project(x' + step g / ||g||_2), in place
  m.def(
      "pgd_step_(Tensor(a!) adv, Tensor grad, Tensor clean, float step_size, float epsilon, float lower, float upper, "
      "str norm) -> ()");
  // x + radius U[-1, 1), x + radius (uniform in the unit L2 ball), both clipped to the box, or x + radius N(0, 1)
  m.def(
      "random_start(Tensor clean, Tensor index, str kind, float radius, float lower, float upper, int key) -> Tensor");
  // the x86-64 level that run-time dispatch chose
  m.def("simd_level() -> str");
}

// Importing the module from Python loads the library; there is nothing else in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
