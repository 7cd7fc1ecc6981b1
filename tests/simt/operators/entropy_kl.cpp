#include "cuda/entropy_kl.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(EntropyKLForward, clean, adv, entropy, kl, normalisers, classes);
DTF_OPERATOR(EntropyKLBackward, grad_entropy, grad_kl, clean, adv, entropy, kl, normalisers, grad_clean, grad_adv,
             classes);

}  // namespace dtf::simt
